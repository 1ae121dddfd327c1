//! `image.toml`: what an image is made of, what is in it, and what its boot test has learnt.
//!
//! Written by `image::build`, completed by the boot test (`info`), read by `image::store`. Unknown
//! keys are errors: a newer format has a newer `format_version`, and is refused by that.

use crate::machine_spec::{DockerSettings, Executor};
use dayfly_guest_config::{CONTRACT, CONTRACT_OLDEST, Can, WIRE_CONTRACT};
use figment::Figment;
use figment::providers::{Format as _, Toml};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use toml_edit::{DocumentMut, Item, Table, value};

/// The format that this dayfly writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// File name of the manifest in its image's directory.
pub const MANIFEST_FILE: &str = "image.toml";

/// The word of [`Manifest::networks`] for an image whose machines can do without a network card.
const RELAY: &str = "relay";

/// An image in words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT_VERSION`].
    pub format_version: u32,
    /// Name of the image.
    pub name: String,
    /// As `uname -m` says it: `x86_64`.
    pub architecture: String,
    /// How it boots.
    pub boot: BootKind,
    /// Kernel command line; boot kind `direct` only.
    #[serde(default)]
    pub cmdline: Option<String>,
    /// The guest contract that its guest program speaks; images of before contracts were counted speak the first.
    #[serde(default = "first_contract")]
    pub contract: u32,
    /// How its runner runs jobs.
    pub executor: ExecutorKind,
    /// The networks that it can be given besides one with a card: `relay`. Learnt by the boot test.
    #[serde(default)]
    pub networks: Vec<String>,
    /// What its guest program can besides its contract: [`Ability`]. Learnt likewise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub abilities: Vec<String>,
    /// What the image's runner sends as `info` when it asks for a job, raw JSON; learnt by the boot
    /// test. Without it the image has not been tested and takes no jobs.
    #[serde(default)]
    pub info: Option<String>,
    /// The runner inside.
    pub runner: ImageRunner,
    /// The disk, qcow2 without a backing file.
    pub disk: ImageFile,
    /// Kernel; boot kind `direct` only.
    #[serde(default)]
    pub kernel: Option<ImageFile>,
    /// Initial RAM disk; boot kind `direct` only.
    #[serde(default)]
    pub initrd: Option<ImageFile>,
    /// What its Docker has inside, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub docker: Option<DockerInside>,
    /// What it was built from.
    #[serde(default)]
    pub build: BuildInputs,
}

fn first_contract() -> u32 {
    1
}

/// How an image boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootKind {
    /// The hypervisor loads kernel and initrd.
    Direct,
    /// The disk has a boot loader.
    Disk,
}

/// How the runner of an image runs jobs. What a class says of it goes into `machine_spec::Executor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExecutorKind {
    /// In the machine itself.
    Shell,
    /// In containers.
    Docker,
}

impl fmt::Display for ExecutorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shell => "shell",
            Self::Docker => "docker",
        })
    }
}

/// What an image with Docker was given at its build.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DockerInside {
    /// The runner's helper image, by its name in there; none: the runner fetches its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub helper_image: Option<String>,
    /// The container image of a job that names none, where the class names none either.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_image: Option<String>,
    /// Names of all container images that are in it.
    pub images: Vec<String>,
}

/// The runner inside an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRunner {
    /// What it calls itself: `19.3.0`.
    pub version: String,
    /// Its revision, if it tells one.
    #[serde(default)]
    pub revision: Option<String>,
    /// Where it came from.
    pub origin: RunnerOrigin,
    /// Digest of the program, hex.
    pub sha256: String,
}

/// Where an image's runner came from (`vm-images/README.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunnerOrigin {
    /// A path that the operator gave.
    Path,
    /// The host's installed gitlab-runner.
    Host,
    /// An official release, downloaded.
    Download,
    /// Not the official runner at all, but dayfly's stand-in, for trials and tests.
    Standin,
}

impl fmt::Display for RunnerOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Path => "path",
            Self::Host => "host",
            Self::Download => "download",
            Self::Standin => "standin",
        })
    }
}

/// What only a booted image can tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Learnt {
    /// What its runner says of itself, raw JSON.
    pub info: String,
    /// The guest contract that its guest program speaks.
    pub contract: u32,
    /// What it can besides.
    pub can: Can,
}

/// Something that not all guest programs of a contract can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ability {
    /// To stay when its runner has ended.
    Stay,
    /// To give its host a shell.
    Shell,
    /// To put what its host has of a job's repository where git finds it.
    Clone,
    /// To be frozen while it waits for a job, for others to be restored from it.
    Hold,
}

impl Ability {
    fn word(self) -> &'static str {
        match self {
            Self::Stay => "stay",
            Self::Shell => "shell",
            Self::Clone => "clone",
            Self::Hold => "hold",
        }
    }
}

/// One file of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageFile {
    /// Its name in the image's directory; a plain name.
    pub file: String,
    /// Length in bytes.
    pub bytes: u64,
    /// Digest, hex.
    pub sha256: String,
}

/// What an image was built from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BuildInputs {
    /// Distribution and suite: `debian bookworm`.
    pub suite: String,
    /// Kernel package and version.
    pub kernel: String,
    /// Version of each package inside, by name.
    pub packages: BTreeMap<String, String>,
}

impl Manifest {
    /// What the image's runner says of itself, if the boot test has learnt it.
    #[must_use]
    pub fn runner_info(&self) -> Option<crate::gitlab::RunnerInfo> {
        serde_json::from_str(self.info.as_deref()?).ok()
    }

    /// How a job in it runs, where its class says this of containers.
    #[must_use]
    pub fn executor_of(&self, class: &DockerSettings) -> Executor {
        match self.executor {
            ExecutorKind::Shell => Executor::Shell,
            ExecutorKind::Docker => {
                let inside = self.docker.clone().unwrap_or_default();
                Executor::Docker(DockerSettings {
                    image: class.image.clone().or(inside.container_image),
                    helper_image: class.helper_image.clone().or(inside.helper_image),
                    ..class.clone()
                })
            }
        }
    }

    /// Takes in what a boot test has learnt.
    pub fn learn(&mut self, learnt: Learnt) {
        self.info = Some(learnt.info);
        self.contract = learnt.contract;
        self.networks = learnt.can.relay.then(|| RELAY.to_owned()).into_iter().collect();
        let can = [
            (Ability::Stay, learnt.can.stay),
            (Ability::Shell, learnt.can.shell),
            (Ability::Clone, learnt.can.clone),
            (Ability::Hold, learnt.can.hold),
        ];
        self.abilities =
            can.into_iter().filter(|(_, can)| *can).map(|(ability, _)| ability.word().to_owned()).collect();
    }

    /// Whether its guest program can do this.
    #[must_use]
    pub fn can(&self, ability: Ability) -> bool {
        self.abilities.iter().any(|word| word == ability.word())
    }

    /// Whether a machine of it can do without a network card.
    #[must_use]
    pub fn can_relay(&self) -> bool {
        self.contract >= WIRE_CONTRACT && self.networks.iter().any(|network| network == RELAY)
    }

    /// Whether its guests can be frozen while they wait for a job, for others to be restored from them.
    #[must_use]
    pub fn can_hold(&self) -> bool {
        self.contract >= WIRE_CONTRACT && self.can(Ability::Hold)
    }

    /// Why no job can run in it, if that is so by the contract of its guest program.
    #[must_use]
    pub fn unspoken(&self) -> Option<String> {
        if self.contract < CONTRACT_OLDEST {
            Some(format!(
                "image `{0}` was built for an older dayfly (guest contract {1}; this one speaks {CONTRACT_OLDEST} and {CONTRACT}): rebuild it with `dayfly image build {0}`",
                self.name, self.contract
            ))
        } else if self.contract > CONTRACT {
            Some(format!(
                "image `{0}` was built by a newer dayfly (guest contract {1}; this one speaks {CONTRACT_OLDEST} and {CONTRACT}): install that one, or rebuild the image with `dayfly image build {0}`",
                self.name, self.contract
            ))
        } else {
            None
        }
    }

    /// Whether the runner inside is not the official one.
    #[must_use]
    pub fn is_standin(&self) -> bool {
        self.runner.origin == RunnerOrigin::Standin || self.runner.version.contains("standin")
    }
}

/// Why a manifest cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not TOML of this format.
    #[error("parse {MANIFEST_FILE}")]
    Parse(#[source] Box<figment::Error>),
    /// Made by another version of dayfly.
    #[error("{MANIFEST_FILE} has format version {0}, this dayfly reads {FORMAT_VERSION}")]
    Version(u32),
    /// The members do not go together.
    #[error("{MANIFEST_FILE}: {0}")]
    Inconsistent(&'static str),
}

impl Manifest {
    /// Reads a manifest and checks that its members go together.
    ///
    /// # Errors
    /// [`ManifestError`].
    pub fn parse(text: &str) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Versioned {
            format_version: u32,
        }
        let figment = Figment::from(Toml::string(text));
        let parse = |error| ManifestError::Parse(Box::new(error));
        let versioned: Versioned = figment.extract().map_err(parse)?;
        if versioned.format_version != FORMAT_VERSION {
            return Err(ManifestError::Version(versioned.format_version));
        }
        let manifest: Self = figment.extract().map_err(parse)?;
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), ManifestError> {
        let direct = [self.kernel.is_some(), self.initrd.is_some(), self.cmdline.is_some()];
        match self.boot {
            BootKind::Direct if direct != [true; 3] => {
                return Err(ManifestError::Inconsistent("boot kind `direct` needs kernel, initrd and cmdline"));
            }
            BootKind::Disk if direct != [false; 3] => {
                return Err(ManifestError::Inconsistent("boot kind `disk` has no kernel, initrd or cmdline"));
            }
            _ => {}
        }
        let plain = |file: &ImageFile| !file.file.is_empty() && !file.file.starts_with('.') && !file.file.contains('/');
        if !self.files().all(plain) {
            return Err(ManifestError::Inconsistent("file names must be plain names"));
        }
        if self.info.as_deref().is_some_and(|info| serde_json::from_str::<&serde_json::value::RawValue>(info).is_err())
        {
            return Err(ManifestError::Inconsistent("`info` is not JSON"));
        }
        Ok(())
    }

    /// All files of the image, the manifest apart.
    pub fn files(&self) -> impl Iterator<Item = &ImageFile> {
        std::iter::once(&self.disk).chain(&self.kernel).chain(&self.initrd)
    }

    /// The text of `image.toml`.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut document = DocumentMut::new();
        document.decor_mut().set_prefix("# Written by `dayfly image build`; digests hold it to the files beside it.\n");
        document["format_version"] = value(i64::from(self.format_version));
        document["name"] = value(&self.name);
        document["architecture"] = value(&self.architecture);
        document["boot"] = value(match self.boot {
            BootKind::Direct => "direct",
            BootKind::Disk => "disk",
        });
        optional(&mut document, "cmdline", self.cmdline.as_deref());
        document["contract"] = value(i64::from(self.contract));
        document["executor"] = value(self.executor.to_string());
        for (key, words) in [("networks", &self.networks), ("abilities", &self.abilities)] {
            if !words.is_empty() {
                document[key] = value(words.iter().collect::<toml_edit::Array>());
            }
        }
        optional(&mut document, "info", self.info.as_deref());

        let mut runner = Table::new();
        runner["version"] = value(&self.runner.version);
        optional(&mut runner, "revision", self.runner.revision.as_deref());
        runner["origin"] = value(self.runner.origin.to_string());
        runner["sha256"] = value(&self.runner.sha256);
        document["runner"] = Item::Table(runner);

        for (name, file) in
            [("disk", Some(&self.disk)), ("kernel", self.kernel.as_ref()), ("initrd", self.initrd.as_ref())]
        {
            if let Some(file) = file {
                let mut table = Table::new();
                table["file"] = value(&file.file);
                // TOML's integers are signed; no file is longer than 2^63.
                table["bytes"] = value(i64::try_from(file.bytes).unwrap_or(i64::MAX));
                table["sha256"] = value(&file.sha256);
                document[name] = Item::Table(table);
            }
        }

        if let Some(inside) = &self.docker {
            let mut table = Table::new();
            for (key, text) in [("helper_image", &inside.helper_image), ("container_image", &inside.container_image)] {
                if let Some(text) = text {
                    table[key] = value(text);
                }
            }
            table["images"] = value(inside.images.iter().collect::<toml_edit::Array>());
            document["docker"] = Item::Table(table);
        }

        let mut build = Table::new();
        build["suite"] = value(&self.build.suite);
        build["kernel"] = value(&self.build.kernel);
        let mut packages = Table::new();
        for (name, version) in &self.build.packages {
            packages[name.as_str()] = value(version);
        }
        build["packages"] = Item::Table(packages);
        document["build"] = Item::Table(build);
        document.to_string()
    }
}

fn optional(table: &mut Table, key: &str, text: Option<&str>) {
    if let Some(text) = text {
        table[key] = value(text);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A manifest with something in each member.
    pub(crate) fn example() -> Manifest {
        let file = |name: &str| ImageFile { file: name.into(), bytes: 3, sha256: "ab".repeat(32) };
        Manifest {
            format_version: FORMAT_VERSION,
            name: "debian-12-shell".into(),
            architecture: std::env::consts::ARCH.into(),
            boot: BootKind::Direct,
            cmdline: Some("root=/dev/vda \"quoted\"".into()),
            contract: dayfly_guest_config::CONTRACT,
            executor: ExecutorKind::Shell,
            networks: vec![RELAY.into()],
            abilities: Vec::new(),
            info: Some(r#"{"name":"gitlab-runner","features":{"trace_reset":true}}"#.into()),
            runner: ImageRunner {
                version: "19.3.0".into(),
                revision: Some("9cbf0074".into()),
                origin: RunnerOrigin::Standin,
                sha256: "cd".repeat(32),
            },
            disk: file("disk.qcow2"),
            kernel: Some(file("vmlinuz")),
            initrd: Some(file("initrd")),
            docker: None,
            build: BuildInputs {
                suite: "debian bookworm".into(),
                kernel: "linux-image-x 6.1".into(),
                packages: BTreeMap::from([
                    ("libstdc++6".into(), "12.2.0-14+deb12u1".into()),
                    ("git".into(), "1:2.39.5-0+deb12u3".into()),
                ]),
            },
        }
    }

    #[test]
    fn a_manifest_reads_back_as_it_was_written() {
        let mut manifest = example();
        assert_eq!(Manifest::parse(&manifest.to_text()).unwrap(), manifest);
        assert!(manifest.to_text().contains("\nnetworks = [\"relay\"]\n") && manifest.can_relay());
        manifest.boot = BootKind::Disk;
        (manifest.cmdline, manifest.kernel, manifest.initrd, manifest.info, manifest.runner.revision) =
            (None, None, None, None, None);
        let can = Can { shell: true, ..Can::default() };
        manifest.learn(Learnt { info: "{}".into(), contract: 2, can });
        assert!(!manifest.to_text().contains("networks") && !manifest.can_relay());
        assert!(manifest.can(Ability::Shell) && !manifest.can(Ability::Stay));
        assert_eq!(Manifest::parse(&manifest.to_text()).unwrap(), manifest);
        manifest.learn(Learnt { info: "{}".into(), contract: 2, can: Can::default() });
        assert!(!manifest.to_text().contains("abilities"), "as images of before were written");
        assert_eq!(Manifest::parse(&manifest.to_text()).unwrap(), manifest);
    }

    #[test]
    fn an_image_says_what_its_docker_has() {
        let mut manifest = example();
        assert!(!manifest.to_text().contains("docker"), "as images of before were written");
        manifest.executor = ExecutorKind::Docker;
        for inside in [
            DockerInside::default(),
            DockerInside {
                helper_image: Some("dayfly/helper:19.3.0".into()),
                container_image: Some("debian:12".into()),
                images: vec!["dayfly/helper:19.3.0".into(), "debian:12".into()],
            },
        ] {
            manifest.docker = Some(inside);
            assert_eq!(Manifest::parse(&manifest.to_text()).unwrap(), manifest);
        }
        let of = |class: &DockerSettings| match manifest.executor_of(class) {
            Executor::Docker(settings) => (settings.image.unwrap(), settings.helper_image.unwrap(), settings.socket),
            Executor::Shell => panic!("the image's executor is docker"),
        };
        let helper = "dayfly/helper:19.3.0".to_owned();
        assert_eq!(of(&DockerSettings::default()), ("debian:12".into(), helper.clone(), false));
        let class = DockerSettings { image: Some("ruby:3".into()), socket: true, ..DockerSettings::default() };
        assert_eq!(of(&class), ("ruby:3".into(), helper, true), "the class's word is the first");
        let other = manifest.to_text().replace("executor = \"docker\"", "executor = \"kubernetes\"");
        let error = crate::telemetry::chain(&Manifest::parse(&other).unwrap_err());
        assert!(error.contains("kubernetes") && error.contains("`shell` or `docker`"), "{error}");
    }

    #[test]
    fn another_version_is_refused_by_its_number_and_not_by_its_keys() {
        let text = "format_version = 2\nnew_key = 1\n";
        assert_eq!(
            Manifest::parse(text).unwrap_err().to_string(),
            "image.toml has format version 2, this dayfly reads 1"
        );
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let broken = |change: fn(&mut Manifest)| {
            let mut manifest = example();
            change(&mut manifest);
            Manifest::parse(&manifest.to_text()).unwrap_err().to_string()
        };
        assert!(broken(|m| m.kernel = None).contains("`direct` needs kernel"));
        assert!(broken(|m| m.boot = BootKind::Disk).contains("`disk` has no kernel"));
        assert!(broken(|m| m.disk.file = "../../etc/shadow".into()).contains("plain names"));
        assert!(broken(|m| m.info = Some("{".into())).contains("not JSON"));
        let unknown = format!("extra = 1\n{}", example().to_text());
        assert!(matches!(Manifest::parse(&unknown), Err(ManifestError::Parse(_))));
        assert!(matches!(Manifest::parse("= nonsense"), Err(ManifestError::Parse(_))));
    }
}
