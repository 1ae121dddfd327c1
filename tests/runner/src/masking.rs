//! Hides secrets in a stream of UTF-8, also where a secret is cut between two reads.
//!
//! Two steps, in this order: the values of masked variables become `[MASKED]`; what follows a token's
//! prefix (`glpat-…`) or the name of a secret in a URL (`private_token=…`) becomes `[MASKED]`.

/// What stands in place of a secret.
const MASK: &[u8] = b"[MASKED]";

/// Prefixes that 19.3 masks by itself; GitLab's `token_mask_prefixes` come on top.
const TOKEN_PREFIXES: [&str; 14] = [
    "glpat-",
    "gloas-",
    "gldt-",
    "glrt-",
    "glcbt-",
    "glrtr-",
    "glptt-",
    "glft-",
    "glimt-",
    "glagent-",
    "glsoat-",
    "glffct-",
    "_gitlab_session=",
    "gltok-",
];

/// Query members of URLs that carry secrets, in lower case.
const URL_PARAMETERS: [&str; 6] = [
    "private_token=",
    "authenticity_token=",
    "rss_token=",
    "x-amz-signature=",
    "x-amz-credential=",
    "x-amz-security-token=",
];

/// Both steps for one stream.
pub(crate) struct Mask {
    phrases: Search,
    prefixes: Search,
    /// A prefix was written; characters of the token are being dropped. `true` inside: the mask stands already.
    in_token: Option<bool>,
}

impl Mask {
    /// Hides `values`, and tokens with these extra prefixes.
    pub(crate) fn new(values: &[String], token_prefixes: &[String]) -> Self {
        let phrases = values.iter().map(|value| value.clone().into_bytes()).collect();
        let prefixes = TOKEN_PREFIXES
            .iter()
            .chain(&URL_PARAMETERS)
            .map(|prefix| prefix.as_bytes().to_vec())
            .chain(token_prefixes.iter().map(|prefix| prefix.clone().into_bytes()))
            .collect();
        Self { phrases: Search::new(phrases, false), prefixes: Search::new(prefixes, true), in_token: None }
    }

    /// Takes bytes of the stream and gives back what may be shown by now.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<u8> {
        let unmasked = self.phrases.push(bytes, |_| MASK.to_vec(), false);
        self.tokens(&unmasked, false)
    }

    /// The stream has ended: what was held back is no secret.
    pub(crate) fn finish(&mut self) -> Vec<u8> {
        let rest = self.phrases.push(&[], |_| MASK.to_vec(), true);
        self.tokens(&rest, true)
    }

    fn tokens(&mut self, bytes: &[u8], last: bool) -> Vec<u8> {
        let mut marked = Vec::with_capacity(bytes.len());
        let found = self.prefixes.push(
            bytes,
            |prefix| {
                let mut text = prefix.to_vec();
                text.push(TOKEN_BEGINS);
                text
            },
            last,
        );
        for byte in found {
            match (byte, self.in_token) {
                (TOKEN_BEGINS, _) => self.in_token = Some(false),
                (byte, Some(masked)) if is_token_byte(byte) => {
                    if !masked {
                        marked.extend_from_slice(MASK);
                        self.in_token = Some(true);
                    }
                }
                (byte, _) => {
                    self.in_token = None;
                    marked.push(byte);
                }
            }
        }
        marked
    }
}

/// Marks a token's first character between the two walks: a byte that UTF-8 never has.
const TOKEN_BEGINS: u8 = 0xff;

fn is_token_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._=".contains(&byte)
}

/// Finds phrases in a stream and replaces them, the longest first; holds back what may become one.
struct Search {
    phrases: Vec<Vec<u8>>,
    /// Which bytes a phrase begins with: nearly all bytes pass by this table alone.
    begins: [bool; 256],
    ignore_case: bool,
    held: Vec<u8>,
}

impl Search {
    fn new(mut phrases: Vec<Vec<u8>>, ignore_case: bool) -> Self {
        phrases.retain(|phrase| !phrase.is_empty());
        phrases.sort_by_key(|phrase| std::cmp::Reverse(phrase.len()));
        phrases.dedup();
        let mut begins = [false; 256];
        for phrase in &phrases {
            begins[usize::from(phrase[0])] = true;
            if ignore_case {
                begins[usize::from(phrase[0].to_ascii_lowercase())] = true;
                begins[usize::from(phrase[0].to_ascii_uppercase())] = true;
            }
        }
        Self { phrases, begins, ignore_case, held: Vec::new() }
    }

    fn push(&mut self, bytes: &[u8], replace: impl Fn(&[u8]) -> Vec<u8>, last: bool) -> Vec<u8> {
        let mut text = std::mem::take(&mut self.held);
        text.extend_from_slice(bytes);
        let mut out = Vec::with_capacity(text.len());
        let mut at = 0;
        while at < text.len() {
            let rest = &text[at..];
            if !self.begins[usize::from(rest[0])] {
                out.push(rest[0]);
                at += 1;
                continue;
            }
            // A longer phrase that is cut here may still come: only then wait.
            let longest_cut = self.phrases.iter().find(|phrase| rest.len() < phrase.len() && self.agrees(rest, phrase));
            let whole = self.phrases.iter().find(|phrase| self.agrees(rest, phrase) && phrase.len() <= rest.len());
            match (longest_cut, whole) {
                (Some(_), _) if !last => {
                    self.held = rest.to_vec();
                    return out;
                }
                (_, Some(phrase)) => {
                    out.extend(replace(&rest[..phrase.len()]));
                    at += phrase.len();
                }
                _ => {
                    out.push(rest[0]);
                    at += 1;
                }
            }
        }
        out
    }

    /// Whether text and phrase agree as far as both go.
    fn agrees(&self, text: &[u8], phrase: &[u8]) -> bool {
        let common = text.len().min(phrase.len());
        match self.ignore_case {
            true => text[..common].eq_ignore_ascii_case(&phrase[..common]),
            false => text[..common] == phrase[..common],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(values: &[&str], chunks: &[&str]) -> String {
        let values: Vec<String> = values.iter().map(|value| (*value).to_owned()).collect();
        let mut mask = Mask::new(&values, &["site-".to_owned()]);
        let mut out = Vec::new();
        for chunk in chunks {
            out.extend(mask.push(chunk.as_bytes()));
        }
        out.extend(mask.finish());
        String::from_utf8(out).expect("text stays text")
    }

    #[test]
    fn a_secret_cut_between_two_reads_is_hidden() {
        assert_eq!(mask(&["s3cr3tvalue"], &["x s3cr", "3t", "value y"]), "x [MASKED] y");
    }

    #[test]
    fn what_only_begins_like_a_secret_is_shown_in_the_end() {
        assert_eq!(mask(&["s3cr3tvalue"], &["s3cr3t", "!", " s3c"]), "s3cr3t! s3c");
    }

    #[test]
    fn the_longest_of_two_secrets_wins() {
        assert_eq!(mask(&["abc", "abcdef"], &["abcdef abcx"]), "[MASKED] [MASKED]x");
        assert_eq!(mask(&["abc", "abcdef"], &["abc", "def"]), "[MASKED]");
    }

    #[test]
    fn a_secret_of_several_lines_is_hidden() {
        assert_eq!(mask(&["one\ntwo"], &["a one\n", "two b"]), "a [MASKED] b");
    }

    #[test]
    fn tokens_keep_their_prefix_only() {
        assert_eq!(
            mask(&[], &["glpat-ABC.d_e and glrt", "-x y, site-9;"]),
            "glpat-[MASKED] and glrt-[MASKED] y, site-[MASKED];"
        );
        assert_eq!(mask(&[], &["glpat- none"]), "glpat- none");
    }

    #[test]
    fn secrets_in_urls_are_hidden_in_any_case() {
        assert_eq!(
            mask(&[], &["h/?private_token=abc&x=1 X-Amz-Signature=0a&access_token=zzz"]),
            "h/?private_token=[MASKED]&x=1 X-Amz-Signature=[MASKED]&access_token=zzz"
        );
    }

    #[test]
    fn empty_secrets_hide_nothing() {
        assert_eq!(mask(&["", "x"], &["a x b"]), "a [MASKED] b");
    }
}
