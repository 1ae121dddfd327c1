//! What is asked for? Paths and queries, matched as raw bytes: no decoding, no normalising.
//!
//! A path that needs decoding to match, matches nothing (threats.md T7). Queries are allow-lists,
//! rebuilt for GitLab from the pairs that passed, still percent-encoded.

use crate::gitlab::JobId;

/// A request that we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `POST /jobs/request`.
    AskForJob,
    /// `POST /runners/verify`.
    Verify,
    /// `GET /runners/router/discovery`.
    Discovery,
    /// What only the holder of a runner token may do at GitLab: never forwarded, 403.
    RunnerAdministration,
    /// A route of one job.
    Job(JobId, JobRoute),
    /// The store of `cache:`.
    Cache(CacheRoute),
}

/// What is asked of the store of `cache:`, which the runner takes for S3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheRoute {
    /// `GET`, perhaps of a range.
    Fetch,
    /// `HEAD`.
    Look,
    /// `PUT`.
    Save,
}

/// What is asked of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobRoute {
    /// `PUT /jobs/:id`.
    Update,
    /// `PATCH /jobs/:id/trace`.
    Trace,
    /// `POST /jobs/:id/artifacts`.
    Upload,
    /// `GET /jobs/:id/artifacts`.
    Download,
    /// `GET /jobs/:id/runtime_environment_key`.
    EnvironmentKey,
}

/// A request that we do not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRoute {
    /// 404.
    NotFound,
    /// 405: the path exists, and takes these methods.
    Method(&'static str),
}

impl Route {
    /// The word for logs and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::AskForJob => "ask_for_job",
            Self::Verify => "verify",
            Self::Discovery => "discovery",
            Self::RunnerAdministration => "runner_administration",
            Self::Job(_, JobRoute::Update) => "update",
            Self::Job(_, JobRoute::Trace) => "trace",
            Self::Job(_, JobRoute::Upload) => "upload",
            Self::Job(_, JobRoute::Download) => "download",
            Self::Job(_, JobRoute::EnvironmentKey) => "environment_key",
            Self::Cache(CacheRoute::Fetch) => "cache_fetch",
            Self::Cache(CacheRoute::Look) => "cache_look",
            Self::Cache(CacheRoute::Save) => "cache_save",
        }
    }

    /// Query keys that it takes (threats.md §6.1).
    pub fn query_keys(self) -> &'static [&'static str] {
        match self {
            Self::Job(_, JobRoute::Trace) => &["debug_trace"],
            Self::Job(_, JobRoute::Upload) => &["artifact_type", "artifact_format", "expire_in", "accessibility"],
            Self::Job(_, JobRoute::Download) => &["direct_download", "download_mode"],
            _ => &[],
        }
    }
}

/// Finds the route of `method` and `path`, which is what stands before the question mark.
pub fn route(method: &str, path: &str) -> Result<Route, NoRoute> {
    if path.starts_with("/cache/") {
        let routes = [("GET", CacheRoute::Fetch), ("HEAD", CacheRoute::Look), ("PUT", CacheRoute::Save)];
        let found = routes.into_iter().find(|(name, _)| *name == method);
        return found.map(|(_, route)| Route::Cache(route)).ok_or(NoRoute::Method("GET, HEAD, PUT"));
    }
    let path = path.strip_prefix("/api/v4/").ok_or(NoRoute::NotFound)?;
    let (allowed, found): (&'static str, &[(&str, Route)]) = match path {
        "jobs/request" => ("POST", &[("POST", Route::AskForJob)]),
        "runners/verify" => ("POST", &[("POST", Route::Verify)]),
        "runners/router/discovery" => ("GET", &[("GET", Route::Discovery)]),
        "runners" => {
            ("DELETE, POST", &[("DELETE", Route::RunnerAdministration), ("POST", Route::RunnerAdministration)])
        }
        "runners/managers" => ("DELETE", &[("DELETE", Route::RunnerAdministration)]),
        _ if path.starts_with("runners/") => ("POST", &[("POST", Route::RunnerAdministration)]),
        _ => return job_route(method, path.strip_prefix("jobs/").ok_or(NoRoute::NotFound)?),
    };
    found.iter().find(|(name, _)| *name == method).map(|(_, route)| *route).ok_or(NoRoute::Method(allowed))
}

fn job_route(method: &str, path: &str) -> Result<Route, NoRoute> {
    let (id, rest) = path.split_once('/').map_or((path, None), |(id, rest)| (id, Some(rest)));
    let id = job_id(id).ok_or(NoRoute::NotFound)?;
    let (allowed, found): (&'static str, &[(&str, JobRoute)]) = match rest {
        None => ("PUT", &[("PUT", JobRoute::Update)]),
        Some("trace") => ("PATCH", &[("PATCH", JobRoute::Trace)]),
        Some("artifacts") => ("GET, POST", &[("GET", JobRoute::Download), ("POST", JobRoute::Upload)]),
        Some("runtime_environment_key") => ("GET", &[("GET", JobRoute::EnvironmentKey)]),
        Some(_) => return Err(NoRoute::NotFound),
    };
    let found = found.iter().find(|(name, _)| *name == method).ok_or(NoRoute::Method(allowed))?;
    Ok(Route::Job(id, found.1))
}

/// 1–19 digits, no leading zero: `01`, `+1` and 2^64 are no ids of GitLab's.
fn job_id(text: &str) -> Option<JobId> {
    let digits = (1..=19).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits || text.starts_with('0') {
        return None;
    }
    text.parse().ok().map(JobId)
}

/// The pairs of a query that may go on, still encoded, and how many were dropped.
#[derive(Debug, PartialEq, Eq)]
pub struct Query {
    /// In the guest's order.
    pub pairs: Vec<(String, String)>,
    /// Unknown keys, harmless.
    pub dropped: u64,
}

/// A repeated key, one that looks like a credential, or a value of odd characters: 400.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadQuery;

/// What a key must not hold: GitLab reads `token`, `job_token`, `private_token` and others from the
/// query before it looks at a header (threats.md F2).
const CREDENTIAL_WORDS: [&str; 7] = ["token", "password", "secret", "auth", "credential", "jwt", "api_key"];

impl Query {
    /// Reads what stands behind the question mark; an empty query is one, too (`/artifacts?`).
    pub fn parse(query: &str, allowed: &[&str]) -> Result<Self, BadQuery> {
        let mut read = Self { pairs: Vec::new(), dropped: 0 };
        let mut seen = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let plain = decoded_lower_case(key);
            if seen.contains(&plain) || CREDENTIAL_WORDS.iter().any(|word| plain.contains(word)) {
                return Err(BadQuery);
            }
            seen.push(plain);
            if !allowed.contains(&key) {
                read.dropped += 1;
            } else if is_plain_value(value) {
                read.pairs.push((key.to_owned(), value.to_owned()));
            } else {
                return Err(BadQuery);
            }
        }
        Ok(read)
    }

    /// The value of `key`, still encoded.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }
}

/// What Go's `url.Values` writes, and nothing that another parser could take for a separator (`;`).
fn is_plain_value(value: &str) -> bool {
    let bytes = value.as_bytes();
    bytes.iter().enumerate().all(|(at, byte)| match byte {
        b'%' => bytes.get(at + 1..at + 3).is_some_and(|hex| hex.iter().all(u8::is_ascii_hexdigit)),
        byte => byte.is_ascii_alphanumeric() || b"-._~+*:@!$'(),/".contains(byte),
    })
}

/// For looking only: what a lenient server may take the key for.
fn decoded_lower_case(key: &str) -> String {
    let bytes = key.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        // Digits are looked for first: `from_str_radix` takes `+a` too, and would hide what stands there.
        let escaped = bytes.get(at + 1..at + 3).filter(|hex| *byte == b'%' && hex.iter().all(u8::is_ascii_hexdigit));
        let escaped = escaped.and_then(|hex| std::str::from_utf8(hex).ok());
        match escaped.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(decoded) => {
                plain.push(decoded.to_ascii_lowercase());
                at += 3;
            }
            None => {
                plain.push(byte.to_ascii_lowercase());
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_the_protocol_is_served() {
        let job = |route| Ok(Route::Job(JobId(42), route));
        for (method, path, expected) in [
            ("POST", "/api/v4/jobs/request", Ok(Route::AskForJob)),
            ("POST", "/api/v4/runners/verify", Ok(Route::Verify)),
            ("GET", "/api/v4/runners/router/discovery", Ok(Route::Discovery)),
            ("PUT", "/api/v4/jobs/42", job(JobRoute::Update)),
            ("PATCH", "/api/v4/jobs/42/trace", job(JobRoute::Trace)),
            ("POST", "/api/v4/jobs/42/artifacts", job(JobRoute::Upload)),
            ("GET", "/api/v4/jobs/42/artifacts", job(JobRoute::Download)),
            ("GET", "/api/v4/jobs/42/runtime_environment_key", job(JobRoute::EnvironmentKey)),
            ("DELETE", "/api/v4/runners", Ok(Route::RunnerAdministration)),
            ("DELETE", "/api/v4/runners/managers", Ok(Route::RunnerAdministration)),
            ("POST", "/api/v4/runners", Ok(Route::RunnerAdministration)),
            ("POST", "/api/v4/runners/reset_authentication_token", Ok(Route::RunnerAdministration)),
            ("POST", "/api/v4/runners/7/reset_authentication_token", Ok(Route::RunnerAdministration)),
            ("GET", "/api/v4/jobs/request", Err(NoRoute::Method("POST"))),
            ("PATCH", "/api/v4/jobs/42", Err(NoRoute::Method("PUT"))),
            ("PUT", "/api/v4/jobs/42/trace", Err(NoRoute::Method("PATCH"))),
            ("PUT", "/api/v4/jobs/42/artifacts", Err(NoRoute::Method("GET, POST"))),
            ("PUT", "/cache/project/1/k", Ok(Route::Cache(CacheRoute::Save))),
            ("DELETE", "/cache/project/1/k", Err(NoRoute::Method("GET, HEAD, PUT"))),
        ] {
            assert_eq!(route(method, path), expected, "{method} {path}");
        }
    }

    /// T7: path confusion.
    #[test]
    fn paths_that_would_need_decoding_match_nothing() {
        for id in [
            "0",
            "042",
            "+42",
            "-42",
            "42.0",
            "%34%32",
            "18446744073709551616",
            "99999999999999999999",
            "",
            "4２",
            "42;x",
        ] {
            assert_eq!(route("PUT", &format!("/api/v4/jobs/{id}")), Err(NoRoute::NotFound), "{id}");
        }
        for path in [
            "/",
            "/api/v4",
            "/api/v4/",
            "/api/v4/jobs",
            "/api/v4/jobs/",
            "//api/v4/jobs/42",
            "/api/v4//jobs/42",
            "/api/v4/jobs/42/",
            "/api/v4/jobs//42",
            "/api/v4/jobs/42/trace/",
            "/api/v4/jobs/42/artifacts/authorize",
            "/api/v4/jobs/../jobs/42",
            "/api/v4/./jobs/42",
            "/api/v4/jobs/%2e%2e/42",
            "/api/v4/jobs%2f42",
            "/API/v4/jobs/42",
            "/api/v4/Jobs/42",
            "/api/v4/jobs/42/trace;x",
            "/api/v4/user",
            "/api/graphql",
        ] {
            for method in ["PUT", "PATCH", "POST", "GET"] {
                assert_eq!(route(method, path), Err(NoRoute::NotFound), "{method} {path}");
            }
        }
        assert_eq!(route("PUT", "/api/v4/jobs/9223372036854775807").map(Route::word), Ok("update"));
    }

    #[test]
    fn a_query_keeps_what_is_allowed_as_it_was_written() {
        let allowed = ["expire_in", "artifact_type"];
        let query = Query::parse("artifact_type=archive&&expire_in=1+week%2C3&x=1&y", &allowed).unwrap();
        assert_eq!((query.dropped, query.get("expire_in"), query.get("x")), (2, Some("1+week%2C3"), None));
        assert_eq!(query.pairs[0], ("artifact_type".into(), "archive".into()));
        assert_eq!(Query::parse("", &allowed), Ok(Query { pairs: vec![], dropped: 0 }));
    }

    /// T5: a token in the query wins over our header at GitLab.
    #[test]
    fn credentials_repeats_and_separators_in_a_query_are_refused() {
        for query in [
            "token=x",
            "private_token=x",
            "job_token",
            "access_token=x",
            "TOKEN=x",
            "to%6Ben=x",
            "%+authorization=x",
            "token[]=x",
            "x=1&x=2",
            "expire_in=1&expire_in=2",
            "expire_in=1&expire%5fin=2",
            "expire_in=1;token=x",
            "expire_in=%",
            "expire_in=%g1",
            "password=",
            "authorization=",
        ] {
            assert_eq!(Query::parse(query, &["expire_in"]), Err(BadQuery), "{query}");
        }
    }
}
