//! What may a class's jobs reach, where they have no network card? Its section of the configuration, and what of a job goes
//! into it besides. The decisions themselves are `dayfly_egress::policy`'s.

use dayfly_egress::policy::{HostPort, Mode, Pattern, Policy, PolicyError, Rate};
use serde::{Deserialize, Serialize};
use url::Url;

/// Hosts that a job's payload names at most: GitLab names two.
const NAMED_MAX: usize = 16;

/// `[class.egress]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EgressConfig {
    /// About public destinations that no list names.
    pub mode: Mode,
    /// What may be reached.
    pub allow: Vec<Pattern>,
    /// What may not.
    pub deny: Vec<Pattern>,
    /// How much; none: as fast as it goes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
}

/// `[rule.egress]`: what a rule changes of it for the jobs that it fits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EgressChange {
    /// In place of the class's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// May be reached, too, though `deny` of the class names the same or less.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Pattern>,
    /// May not, either, though `allow` of the class names the same or less.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<Pattern>,
}

impl EgressConfig {
    /// As a rule changes it: its mode goes before the class's, and its lists are added. What one of them covers is taken out
    /// of the class's other list, for the rule is the nearer word; where the class's covers more than the rule's, they
    /// contradict each other, which [`Self::validate`] finds.
    #[must_use]
    pub fn changed(&self, change: &EgressChange) -> Self {
        let merged = |own: &[Pattern], against: &[Pattern], more: &[Pattern]| {
            let mut list: Vec<Pattern> =
                own.iter().filter(|pattern| !against.iter().any(|nearer| nearer.covers(pattern))).cloned().collect();
            list.extend(more.iter().filter(|pattern| !own.contains(pattern)).cloned());
            list
        };
        Self {
            mode: change.mode.unwrap_or(self.mode),
            allow: merged(&self.allow, &change.deny, &change.allow),
            deny: merged(&self.deny, &change.allow, &change.deny),
            rate: self.rate,
        }
    }

    /// The policy of a job that cannot do without `always`.
    #[must_use]
    pub fn policy(&self, always: Vec<HostPort>) -> Policy {
        let Self { mode, allow, deny, rate } = self.clone();
        Policy { mode, allow, deny, always, own: Vec::new(), rate }
    }

    /// Whether it makes sense, for jobs that cannot do without `always`.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn validate(&self, always: Vec<HostPort>) -> Result<(), PolicyError> {
        self.policy(always).validate()
    }
}

/// What a job cannot do without: GitLab as the daemon and as guests know it, and the hosts that GitLab's own credentials
/// are for (its registry, its dependency proxy). Never from a variable: an author can set those.
#[must_use]
pub fn always<'a>(urls: impl IntoIterator<Item = &'a Url>, registries: &[String]) -> Vec<HostPort> {
    let of_url = |url: &Url| format!("{}:{}", url.host_str()?, url.port_or_known_default()?).parse().ok();
    let of_registry = |text: &String| {
        let text = text.split_once("://").map_or(text.as_str(), |(_, rest)| rest);
        let host = text.split('/').next().unwrap_or_default();
        // Without a port: a registry speaks TLS.
        host.parse().ok().or_else(|| format!("{host}:443").parse().ok())
    };
    let mut all: Vec<HostPort> = Vec::new();
    let registries = registries.iter().take(NAMED_MAX).filter_map(of_registry);
    for host in urls.into_iter().filter_map(of_url).chain(registries) {
        if !all.contains(&host) {
            all.push(host);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_the_nearer_word_and_adds_to_what_its_class_says() {
        let list = |of: &[&str]| of.iter().map(|text| text.parse().unwrap()).collect::<Vec<Pattern>>();
        let class = EgressConfig {
            allow: list(&["pypi.org:443", "*.debian.org"]),
            deny: list(&["mail.corp:25", "*.evil.example"]),
            rate: Some(Rate { connections: Some(7), ..Rate::default() }),
            ..EgressConfig::default()
        };
        let change = |allow: &[&str], deny: &[&str], mode| EgressChange { mode, allow: list(allow), deny: list(deny) };
        assert_eq!(class.changed(&EgressChange::default()), class);
        // Narrower: what its class lists is taken out; wider: what its class refuses.
        let narrow = class.changed(&change(&[], &["*.debian.org"], Some(Mode::Enforce)));
        assert_eq!((narrow.mode, narrow.allow, narrow.rate), (Mode::Enforce, list(&["pypi.org:443"]), class.rate));
        assert_eq!(narrow.deny, list(&["mail.corp:25", "*.evil.example", "*.debian.org"]));
        let wide = class.changed(&change(&["mail.corp", "pypi.org:443"], &[], None));
        assert_eq!(wide.allow, list(&["pypi.org:443", "*.debian.org", "mail.corp"]));
        assert_eq!(wide.deny, list(&["*.evil.example"]));
        assert!(wide.validate(Vec::new()).is_ok());
        // What its class refuses more of cannot be let through.
        let against = class.changed(&change(&["good.evil.example"], &[], None)).validate(Vec::new()).unwrap_err();
        assert!(against.to_string().contains("`*.evil.example` in `deny` covers it"), "{against}");
        let itself = class.changed(&change(&["a.example"], &["a.example"], None)).validate(Vec::new());
        assert!(itself.is_err(), "of one and the same rule");
    }

    #[test]
    fn what_a_job_cannot_do_without_is_gitlab_and_what_its_credentials_are_for() {
        let urls = ["https://gitlab.example/sub", "http://[fd00::1]:8080/", "https://GitLab.example:443"];
        let urls: Vec<Url> = urls.iter().map(|url| url.parse().unwrap()).collect();
        let registries =
            ["registry.example:5050", "https://gitlab.example/x", "proxy.example", "", "a b", "registry.example:5050"];
        let registries: Vec<String> = registries.iter().map(|text| (*text).to_owned()).collect();
        let shown: Vec<String> = always(&urls, &registries).iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["gitlab.example:443", "[fd00::1]:8080", "registry.example:5050", "proxy.example:443"]);
        let many: Vec<String> = (0..1000).map(|n| format!("r{n}.example")).collect();
        assert_eq!(always(&urls, &many).len(), 2 + NAMED_MAX);
    }
}
