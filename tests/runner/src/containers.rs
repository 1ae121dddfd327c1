//! The docker executor, as small as dayfly's tests need it: the author's scripts run in containers of the machine's Docker,
//! by its command, with the job's services beside them. Sources and artifacts are got and moved outside of them.
//!
//! Not there: the helper image (it is looked for, no more), health checks of services, networks and caches of jobs, users,
//! logins at registries.

use crate::config::Runner;
use crate::payload::{Job, Service};
use crate::script::{Script, quote};
use crate::variables::Variables;
use std::path::Path;

/// The container that runs a script; one at a time.
const NAME: &str = "dayfly-build";

/// What a job's containers are made of.
pub(crate) struct Containers {
    image: String,
    entrypoint: Option<String>,
    pull: String,
    services: Vec<Service>,
    runner: Runner,
}

impl Containers {
    /// Those of a job; none: its scripts run in the machine.
    ///
    /// # Errors
    /// No image is named, neither by the job nor by config.toml.
    pub(crate) fn of(job: &Job, runner: &Runner, variables: &Variables) -> Result<Option<Self>, &'static str> {
        if runner.executor != "docker" {
            return Ok(None);
        }
        let named = variables.expand(&job.image.name);
        let image = if named.is_empty() { runner.docker.image.clone() } else { named };
        if image.is_empty() {
            return Err("no image specified and no default set in config");
        }
        let pull = match job.image.pull_policy.first().or(runner.docker.pull_policy.first()).map(String::as_str) {
            Some("always") => "always",
            Some("never") => "never",
            _ => "missing",
        };
        let services =
            job.services.iter().map(|service| Service { name: variables.expand(&service.name), ..service.clone() });
        Ok(Some(Self {
            image,
            entrypoint: job.image.entrypoint.first().cloned(),
            pull: pull.to_owned(),
            services: services.collect(),
            runner: runner.clone(),
        }))
    }

    /// Starts the services. They run until the machine ends.
    pub(crate) fn prepare(&self, variables: &Variables) -> Script {
        let mut script = Script::new(variables);
        script.notice(&format!("Using Docker executor of dayfly's stand-in runner with image {} ...", self.image));
        if !self.runner.docker.helper_image.is_empty() {
            let format = "Helper image {{index .RepoTags 0}} is there, and not used";
            script.command(&["docker", "image", "inspect", "--format", format, &self.runner.docker.helper_image]);
        }
        for (number, service) in self.services.iter().enumerate() {
            let name = format!("dayfly-service-{number}");
            let mut words = vec!["docker", "run", "--detach", "--pull", &self.pull, "--name", &name];
            let variables: Vec<String> =
                service.variables.iter().map(|variable| format!("{}={}", variable.key, variable.value)).collect();
            words.extend(variables.iter().flat_map(|variable| ["--env", variable]));
            if let Some(entrypoint) = service.entrypoint.first() {
                words.extend(["--entrypoint", entrypoint]);
            }
            words.push(&service.name);
            words.extend(service.entrypoint.iter().skip(1).chain(&service.command).map(String::as_str));
            script.notice(&format!("Starting service {} ...", service.name)).command(&words);
        }
        script
    }

    /// What runs this script in a container, as a script of the machine's. SIGTERM ends the container.
    pub(crate) fn around(&self, inner: &Path) -> String {
        let mut words =
            vec!["docker", "run", "--rm", "--interactive", "--sig-proxy=false", "--pull", &self.pull, "--name", NAME];
        for volume in &self.runner.docker.volumes {
            words.extend(["--volume", volume]);
        }
        if self.runner.docker.privileged {
            words.push("--privileged");
        }
        let links: Vec<String> = self
            .services
            .iter()
            .enumerate()
            .flat_map(|(number, service)| {
                service.aliases().into_iter().map(move |alias| format!("dayfly-service-{number}:{alias}"))
            })
            .collect();
        words.extend(links.iter().flat_map(|link| ["--link", link]));
        if let Some(entrypoint) = &self.entrypoint {
            words.extend(["--entrypoint", entrypoint]);
        }
        words.extend([self.image.as_str(), "sh"]);
        let words: Vec<String> = words.iter().map(|word| quote(word)).collect();
        format!(
            "trap 'docker kill {NAME} >/dev/null 2>&1' TERM\n{} < {} &\nchild=$!\n\
             while wait \"$child\"; code=$?; kill -0 \"$child\" 2>/dev/null; do :; done\nexit \"$code\"\n",
            words.join(" "),
            quote(&inner.to_string_lossy()),
        )
    }

    /// A script of the machine's bash for whatever shell a container has.
    pub(crate) fn portable(text: &str) -> String {
        let rest = text.strip_prefix("set -eo pipefail\n").unwrap_or(text);
        format!(
            "set -e\n(set -o pipefail) 2>/dev/null && set -o pipefail\n\
             command -v builtin >/dev/null 2>&1 || builtin() {{ \"$@\"; }}\n{rest}"
        )
    }
}

impl Service {
    /// What a job's containers call it: its aliases, else its image's name, with `/` as `__` and as `-`.
    fn aliases(&self) -> Vec<String> {
        let given: Vec<String> =
            self.alias.split([' ', ',']).filter(|alias| !alias.is_empty()).map(str::to_owned).collect();
        if !given.is_empty() {
            return given;
        }
        let name = self.name.rsplit_once('@').map_or(self.name.as_str(), |(name, _)| name);
        // A colon behind the last slash is a tag's, one before it a port's.
        let name = match name.rsplit_once(':') {
            Some((before, tag)) if !tag.contains('/') => before,
            _ => name,
        };
        let mut aliases = vec![name.replace('/', "__"), name.replace('/', "-")];
        aliases.dedup();
        aliases
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn containers(job: &str, docker: &str) -> Result<Option<Containers>, &'static str> {
        let job = Job::parse(job.as_bytes()).expect("a payload");
        let mut runner: Runner = toml::from_str(&format!("executor = \"docker\"\n[docker]\n{docker}")).expect("TOML");
        if docker.is_empty() {
            runner.executor = "shell".to_owned();
        }
        let variables = Variables::new(vec![crate::variables::plain("TAG", "1")], "/nonexistent".into());
        Containers::of(&job, &runner, &variables)
    }

    #[test]
    fn a_job_has_its_image_with_its_services() {
        let job = r#"{"id": 7, "token": "t", "image": {"name": "job:$TAG", "entrypoint": null, "pull_policy": ["never"]},
            "services": [{"name": "r.example:5000/a/web:2", "alias": "web site", "command": ["serve", "it's"],
            "variables": [{"key": "A", "value": "b c"}]}, {"name": "r.example:5000/a/db"}]}"#;
        let docker = "volumes = [\"/builds:/builds\"]\nprivileged = true\nhelper_image = \"helper:1\"\n";
        let containers = containers(job, docker).expect("an image").expect("docker");
        let text = containers.prepare(&Variables::new(Vec::new(), "/nonexistent".into())).into_text();
        let service = "'docker' 'run' '--detach' '--pull' 'never' '--name' 'dayfly-service-0' '--env' 'A=b c' \
                       'r.example:5000/a/web:2' 'serve' 'it'\\''s'";
        assert!(text.contains(service) && text.contains("'helper:1'"), "{text}");
        let text = containers.around(Path::new("/tmp/inner.sh"));
        let run = "'--volume' '/builds:/builds' '--privileged' '--link' 'dayfly-service-0:web' '--link' 'dayfly-service-0:site' \
                   '--link' 'dayfly-service-1:r.example:5000__a__db' '--link' 'dayfly-service-1:r.example:5000-a-db' 'job:1' 'sh' < '/tmp/inner.sh' &";
        assert!(text.contains(run), "{text}");
    }

    #[test]
    fn a_job_without_an_image_has_the_default_or_cannot_run() {
        let job = r#"{"id": 7, "token": "t"}"#;
        assert!(containers(job, "").expect("the shell").is_none());
        assert!(containers(job, "privileged = false").is_err());
        let text = containers(job, "image = \"default:1\"").expect("an image").expect("docker").around(Path::new("/x"));
        assert!(text.contains("'default:1' 'sh'"), "{text}");
    }

    #[test]
    fn a_container_without_bash_runs_it() {
        let script = Script::new(&Variables::new(Vec::new(), "/nonexistent".into())).into_text();
        let text = format!("{}builtin echo done\n", Containers::portable(&script));
        assert!(!text.contains("-eo pipefail"), "{text}");
        let ended = std::process::Command::new("sh").args(["-c", &text]).output().expect("sh");
        assert_eq!(String::from_utf8_lossy(&ended.stdout), "done\n", "{ended:?}");
    }
}
