//! What the service's user will meet: it is not root, who asks.
//!
//! Root reads everything, so a run as root would call a configuration good of which the daemon cannot read a line. What
//! the daemon must read is tried as its user, by a program that takes on that user's rights; modes alone would not do, for
//! groups and ACLs have their say.

use super::Finding;
use crate::config::{Config, Loaded};
use crate::image::manifest::MANIFEST_FILE;
use crate::image::store::{Image, ImageStore};
use crate::process::{ProcessError, Program};
use crate::telemetry::chain;
use crate::vm::Boot;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The user that the package makes.
const USUAL_USER: &str = "dayfly";

/// A look at one file.
const LOOK: Duration = Duration::from_secs(10);

/// The daemon's user, as the host's list of users has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    name: String,
    uid: u32,
    gid: u32,
}

impl User {
    /// Whose state directory it is; before there is one, the package's user. `None`: no other than root.
    pub(super) fn of(config: &Config, passwd: &str) -> Option<Self> {
        let owner = fs::metadata(&config.state_directory).ok().map(|found| found.uid());
        let found = passwd.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            Some(Self {
                name: (*fields.first()?).to_owned(),
                uid: fields.get(2)?.parse().ok()?,
                gid: fields.get(3)?.parse().ok()?,
            })
        });
        let mut found = found.filter(|user| user.uid != 0);
        match owner {
            Some(0) | None => found.find(|user| user.name == USUAL_USER),
            Some(uid) => found.find(|user| user.uid == uid),
        }
    }

    /// Whether it can read this file.
    async fn reads(&self, path: &Path) -> Result<bool, ProcessError> {
        let program = Program::new("setpriv", LOOK)
            .args([
                "--reuid",
                &self.uid.to_string(),
                "--regid",
                &self.gid.to_string(),
                "--init-groups",
                "--",
                "test",
                "-r",
            ])
            .arg(path);
        match program.run().await {
            Ok(_) => Ok(true),
            Err(ProcessError::Failed { status, .. }) if status.code() == Some(1) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What it must be able to read, with what it is and what to do.
    fn must_read(&self, loaded: &Loaded) -> Vec<(PathBuf, String, String)> {
        let config = &loaded.config;
        let mut all = Vec::new();
        if let Some(file) = &loaded.file {
            all.push((file.clone(), "the configuration".to_owned(), format!("chmod 0644 {}", file.display())));
        }
        for runner in &config.runner {
            let name = &runner.name;
            let anew = format!("dayfly register --name '{name}'");
            all.push((
                runner.token_file.clone(),
                format!("`token_file` of runner `{name}`"),
                format!("{anew}, which writes it anew"),
            ));
            for (key, flag, path) in [
                ("tls_ca_file", "--tls-ca-file", &runner.tls_ca_file),
                ("tls_cert_file", "--tls-cert-file", &runner.tls_cert_file),
                ("tls_key_file", "--tls-key-file", &runner.tls_key_file),
            ] {
                let Some(path) = path else { continue };
                let remedy = format!("{anew} {flag} {}, which makes a copy for it", path.display());
                all.push((path.clone(), format!("`{key}` of runner `{name}`"), remedy));
            }
        }
        let store = ImageStore::new(&config.image_directory);
        for class in &config.class {
            // What is missing is told elsewhere.
            for file in store.get(&class.image).map(|image| files_of(&image)).unwrap_or_default() {
                let what = format!("image `{}` of class `{}`", class.image, class.name);
                all.push((file, what, format!("chmod -R a+rX {}", config.image_directory.display())));
            }
        }
        // A file that is not there is told elsewhere, too; root sees all that are.
        all.retain(|(path, ..)| path.exists());
        all
    }

    /// A finding for each thing that it cannot use.
    pub(super) async fn judge(&self, loaded: &Loaded) -> Vec<Finding> {
        let name = &self.name;
        let mut findings = Vec::new();
        for (path, what, remedy) in self.must_read(loaded) {
            match self.reads(&path).await {
                Ok(true) => {}
                Ok(false) => {
                    findings.push(Finding::bad(format!("user {name} cannot read {}, {what}", path.display()), remedy));
                }
                Err(error) => {
                    let what = format!("whether user {name} can read its files cannot be told: {}", chain(&error));
                    return vec![Finding::warn(what, format!("setpriv --reuid {name} --init-groups dayfly doctor"))];
                }
            }
        }
        for directory in [&loaded.config.state_directory, &loaded.config.runtime_directory] {
            if let Ok(found) = fs::metadata(directory)
                && found.uid() != self.uid
            {
                let what =
                    format!("{} belongs to user {}, and the service runs as {name}", directory.display(), found.uid());
                findings.push(Finding::bad(
                    what,
                    format!("chown {name} {}, if no other dayfly uses it", directory.display()),
                ));
            }
        }
        if findings.is_empty() {
            findings.push(Finding::ok(format!("user {name}, as whom the service runs, can read what it needs")));
        }
        findings
    }
}

/// What a VM starts from.
fn files_of(image: &Image) -> Vec<PathBuf> {
    let mut files = vec![image.dir.join(MANIFEST_FILE), image.disk.clone()];
    if let Boot::Direct { kernel, initrd, .. } = &image.boot {
        files.extend([kernel.clone(), initrd.clone()]);
    }
    files
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt as _, chown};

    const PASSWD: &str =
        "root:x:0:0::/root:/bin/sh\ndayfly:x:990:991::/var/lib/dayfly:/sbin/nologin\nnobody:x:65534:65534::/:/x\n";

    /// A configuration with one runner in a directory that everybody may pass.
    fn place() -> (tempfile::TempDir, Loaded) {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        for (name, text) in [("token", "glrt-abc"), ("ca.pem", "")] {
            fs::write(dir.path().join(name), text).unwrap();
            fs::set_permissions(dir.path().join(name), Permissions::from_mode(0o600)).unwrap();
        }
        let text = "state_directory = \"state\"\nruntime_directory = \"run\"\nimage_directory = \"images\"\n\
                    [[class]]\nname = \"s\"\nimage = \"i\"\n[[runner]]\nname = \"ci\"\nurl = \"https://g.example\"\n\
                    token_file = \"token\"\ntls_ca_file = \"ca.pem\"\nclass = \"s\"\n";
        fs::write(dir.path().join("config.toml"), text).unwrap();
        let loaded = Config::load(&dir.path().join("config.toml")).unwrap();
        (dir, loaded)
    }

    #[test]
    fn the_daemons_user_is_the_owner_of_its_state_or_the_packages() {
        let (dir, loaded) = place();
        let user = |name: &str, uid, gid| Some(User { name: name.into(), uid, gid });
        assert_eq!(User::of(&loaded.config, PASSWD), user("dayfly", 990, 991));
        assert_eq!(User::of(&loaded.config, "root:x:0:0::/root:/bin/sh\n"), None);
        fs::create_dir(dir.path().join("state")).unwrap();
        if chown(dir.path().join("state"), Some(65534), None).is_ok() {
            assert_eq!(User::of(&loaded.config, PASSWD), user("nobody", 65534, 65534));
        }
    }

    /// U17: a run as root finds what the service's user cannot read, and no remedy gives anything to root.
    #[tokio::test]
    async fn what_only_root_can_read_is_bad_for_the_service() {
        // Only root can take on another user's rights.
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let (dir, loaded) = place();
        let user = User { name: "nobody".into(), uid: 65534, gid: 65534 };
        let findings = user.judge(&loaded).await;
        let texts: Vec<String> = findings.iter().map(ToString::to_string).collect();
        assert_eq!(
            findings.iter().map(|finding| finding.level).collect::<Vec<_>>(),
            [Level::Bad, Level::Bad],
            "{texts:?}"
        );
        assert!(
            texts[0].contains("user nobody cannot read") && texts[0].contains("`token_file` of runner `ci`"),
            "{texts:?}"
        );
        assert!(texts[1].contains("dayfly register --name 'ci' --tls-ca-file"), "{texts:?}");
        assert!(texts.iter().all(|text| !text.contains("chown 0") && !text.contains("chown root")), "{texts:?}");
        for name in ["token", "ca.pem"] {
            chown(dir.path().join(name), Some(65534), None).unwrap();
        }
        assert_eq!(user.judge(&loaded).await[0].level, Level::Ok);
        // A directory that it cannot pass is no better than a file that it cannot read.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
        assert_eq!(user.judge(&loaded).await.len(), 3);
    }
}
