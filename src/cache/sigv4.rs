//! AWS Signature Version 4, as S3 wants it: of one request, in its `authorization` header.
//!
//! Pure, and small enough to be our own: SHA-256 and HMAC are here for other reasons, the crates that sign bring ten more.
//! Held to the examples that AWS has published.

use crate::hex::hex;
use crate::secret::Secret;
use hmac::{Hmac, Mac as _};
use jiff::Timestamp;
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;

/// In place of a digest of the body, which is not known before its end; TLS protects it.
pub(super) const UNSIGNED_PAYLOAD: &str = "UNSIGNED-PAYLOAD";

/// The digest of no body.
pub(super) const EMPTY_PAYLOAD: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

/// Who signs.
#[derive(Clone, Debug)]
pub(super) struct Signer {
    pub(super) access_key: String,
    pub(super) secret_key: Secret,
    pub(super) region: String,
}

/// What is signed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Signed<'a> {
    pub(super) method: &'a str,
    /// As it stands in the request: percent-encoded.
    pub(super) path: &'a str,
    /// `name=value` pairs, sorted; empty: none.
    pub(super) query: &'a str,
    /// Names in small letters, sorted; `host`, `x-amz-content-sha256` and `x-amz-date` among them.
    pub(super) headers: &'a [(&'a str, &'a str)],
    /// Hex, or [`UNSIGNED_PAYLOAD`].
    pub(super) payload: &'a str,
}

/// `20130524T000000Z`.
pub(super) fn date(at: Timestamp) -> String {
    at.strftime("%Y%m%dT%H%M%SZ").to_string()
}

impl Signer {
    /// The value of `authorization`. `date`: as in `x-amz-date`.
    pub(super) fn authorization(&self, request: &Signed<'_>, date: &str) -> String {
        let Signed { method, path, query, headers, payload } = *request;
        let (mut canonical, mut names) = (format!("{method}\n{path}\n{query}\n"), String::new());
        for (name, value) in headers {
            let _ = writeln!(canonical, "{name}:{}", value.trim());
            names.push_str(if names.is_empty() { "" } else { ";" });
            names.push_str(name);
        }
        let _ = write!(canonical, "\n{names}\n{payload}");
        let day = date.get(..8).unwrap_or_default();
        let scope = format!("{day}/{}/s3/aws4_request", self.region);
        let text = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{}", hex(&Sha256::digest(canonical.as_bytes())));
        let mut key = mac(format!("AWS4{}", self.secret_key.expose()).as_bytes(), day);
        for part in [self.region.as_str(), "s3", "aws4_request"] {
            key = mac(&key, part);
        }
        let signature = hex(&mac(&key, &text));
        let credential = format!("{}/{scope}", self.access_key);
        format!("AWS4-HMAC-SHA256 Credential={credential},SignedHeaders={names},Signature={signature}")
    }
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Method, path, query, headers, the payload's digest, the signature.
    type Case<'a> = (&'a str, &'a str, &'a str, &'a [(&'a str, &'a str)], &'a str, &'a str);

    /// "Signature Calculations for the Authorization Header: Transferring Payload in a Single Chunk" in AWS's reference
    /// of S3's API.
    #[test]
    fn the_examples_of_aws_come_out() {
        let signer = Signer {
            access_key: "AKIAIOSFODNN7EXAMPLE".into(),
            secret_key: Secret::new("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"),
            region: "us-east-1".into(),
        };
        let (host, date) = (("host", "examplebucket.s3.amazonaws.com"), ("x-amz-date", "20130524T000000Z"));
        let empty = ("x-amz-content-sha256", EMPTY_PAYLOAD);
        let put = "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072";
        let cases: [Case<'_>; 4] = [
            (
                "GET",
                "/test.txt",
                "",
                &[host, ("range", "bytes=0-9"), empty, date],
                EMPTY_PAYLOAD,
                "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
            ),
            (
                "PUT",
                "/test%24file.text",
                "",
                &[
                    ("date", "Fri, 24 May 2013 00:00:00 GMT"),
                    host,
                    ("x-amz-content-sha256", put),
                    date,
                    ("x-amz-storage-class", "REDUCED_REDUNDANCY"),
                ],
                put,
                "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
            ),
            (
                "GET",
                "/",
                "lifecycle=",
                &[host, empty, date],
                EMPTY_PAYLOAD,
                "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
            ),
            (
                "GET",
                "/",
                "max-keys=2&prefix=J",
                &[host, empty, date],
                EMPTY_PAYLOAD,
                "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
            ),
        ];
        for (method, path, query, headers, payload, signature) in cases {
            let request = Signed { method, path, query, headers, payload };
            let authorization = signer.authorization(&request, "20130524T000000Z");
            assert!(authorization.ends_with(&format!(",Signature={signature}")), "{method} {path}: {authorization}");
            assert!(
                authorization.starts_with(
                    "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request,SignedHeaders="
                ),
                "{authorization}"
            );
        }
        assert_eq!(super::date("2013-05-24T00:00:00Z".parse().unwrap()), "20130524T000000Z");
        assert!(!format!("{signer:?}").contains("wJalr"));
    }
}
