//! The proxy environment: which connections to GitLab go through a proxy.
//!
//! Read once, when the transport is made, by the names that curl and Go programs know.

use reqwest::{NoProxy, Proxy};

/// Values of the proxy variables. May hold passwords, so it doesn't print.
#[derive(Clone, Default)]
pub struct ProxyEnvironment {
    /// `HTTPS_PROXY`: for `https://` GitLabs, through CONNECT.
    pub https: Option<String>,
    /// `HTTP_PROXY`: for `http://` GitLabs.
    pub http: Option<String>,
    /// `ALL_PROXY`: where the one above is not set.
    pub all: Option<String>,
    /// `NO_PROXY`: hosts, domains, addresses and subnets to be reached directly; `*` for all.
    pub none: Option<String>,
}

impl ProxyEnvironment {
    /// The process's environment. Upper case goes before lower case, an empty value is none.
    #[must_use]
    pub fn of_process() -> Self {
        Self::from(|name| std::env::var(name).ok())
    }

    fn from(get: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| {
            get(name).filter(|v| !v.is_empty()).or_else(|| get(&name.to_ascii_lowercase()).filter(|v| !v.is_empty()))
        };
        Self { https: get("HTTPS_PROXY"), http: get("HTTP_PROXY"), all: get("ALL_PROXY"), none: get("NO_PROXY") }
    }

    /// What reqwest is told, in order of precedence.
    pub(super) fn proxies(&self) -> Result<Vec<Proxy>, reqwest::Error> {
        // reqwest holds `*` against names only, curl and Go against addresses too.
        if self.none.as_deref().is_some_and(|none| none.split(',').any(|entry| entry.trim() == "*")) {
            return Ok(Vec::new());
        }
        let none = self.none.as_deref().and_then(NoProxy::from_string);
        let with_exceptions = |proxy: Proxy| proxy.no_proxy(none.clone());
        let https = self.https.as_deref().map(Proxy::https);
        let http = self.http.as_deref().map(Proxy::http);
        let all = self.all.as_deref().map(Proxy::all);
        [https, http, all].into_iter().flatten().map(|proxy| proxy.map(with_exceptions)).collect()
    }
}

impl std::fmt::Debug for ProxyEnvironment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ProxyEnvironment")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn upper_case_goes_first_and_empty_is_none() {
        let read = |pairs: &[(&str, &str)]| {
            let pairs: Vec<(String, String)> = pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            ProxyEnvironment::from(move |name| pairs.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()))
        };
        let environment = read(&[
            ("HTTPS_PROXY", "http://a:1"),
            ("https_proxy", "http://b:1"),
            ("HTTP_PROXY", ""),
            ("http_proxy", "http://c:1"),
        ]);
        assert_eq!(environment.https.as_deref(), Some("http://a:1"));
        assert_eq!(environment.http.as_deref(), Some("http://c:1"));
        assert_eq!(environment.proxies().unwrap().len(), 2);
        assert!(read(&[]).proxies().unwrap().is_empty());
        assert!(read(&[("https_proxy", "not a url at all")]).proxies().is_err());
    }
}
