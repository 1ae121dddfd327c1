//! The recipes of `vm-images/`, inside this binary: what an installed dayfly builds without a source tree.

/// A recipe: what lies in its directory.
pub(super) struct Carried {
    pub(super) name: &'static str,
    /// `recipe.toml`.
    pub(super) text: &'static str,
    /// `customize.sh`, if it has one.
    pub(super) customize: Option<&'static str>,
    /// The files of its overlays: path below the root, and text.
    pub(super) files: &'static [(&'static str, &'static str)],
}

pub(super) const CARRIED: [Carried; 5] = [
    Carried {
        name: "debian-12-docker",
        text: include_str!("../../../../vm-images/debian-12-docker/recipe.toml"),
        customize: Some(include_str!("../../../../vm-images/debian-12-docker/customize.sh")),
        files: &DOCKER_FILES,
    },
    Carried {
        name: "debian-12-shell",
        text: include_str!("../../../../vm-images/debian-12-shell/recipe.toml"),
        customize: None,
        files: &[],
    },
    Carried {
        name: "debian-13-disk",
        text: include_str!("../../../../vm-images/debian-13-disk/recipe.toml"),
        customize: Some(include_str!("../../../../vm-images/debian-13-disk/customize.sh")),
        files: &[],
    },
    Carried {
        name: "debian-13-docker",
        text: include_str!("../../../../vm-images/debian-13-docker/recipe.toml"),
        customize: None,
        files: &[],
    },
    Carried {
        name: "debian-13-shell",
        text: include_str!("../../../../vm-images/debian-13-shell/recipe.toml"),
        customize: None,
        files: &[],
    },
];

macro_rules! docker_file {
    ($path:literal) => {
        ($path, include_str!(concat!("../../../../vm-images/debian-12-docker/files/", $path)))
    };
}

/// As they lie below `vm-images/debian-12-docker/files`, which a test holds them to.
const DOCKER_FILES: [(&str, &str); 5] = [
    docker_file!("etc/docker/daemon.json"),
    docker_file!("etc/systemd/system/dayfly-docker.service"),
    docker_file!("etc/systemd/system/dayfly-docker.socket"),
    docker_file!("etc/systemd/system/dayfly-preload.service"),
    docker_file!("usr/lib/dayfly/preload"),
];

/// What every image of Debian gets: path below its root, and text.
pub(super) const SHARED_FILES: [(&str, &str); 3] = [
    ("etc/systemd/system/dayfly-guest.service", include_str!("../../../../vm-images/debian/dayfly-guest.service")),
    ("etc/systemd/system/dayfly.target", include_str!("../../../../vm-images/debian/dayfly.target")),
    ("etc/systemd/system.conf.d/dayfly.conf", include_str!("../../../../vm-images/debian/limits.conf")),
];

/// The first step of every image, and its last.
pub(super) const CUSTOMIZE: &str = include_str!("../../../../vm-images/debian/customize.sh");
pub(super) const SEAL: &str = include_str!("../../../../vm-images/debian/seal.sh");
