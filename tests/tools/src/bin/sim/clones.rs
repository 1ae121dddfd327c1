//! What machines are given of repositories, looked at where it lies: nothing of another project's, nothing beyond the
//! quota, and nothing left of a machine's own.

use crate::world::World;
use dayfly::gitlab::JobId;
use dayfly_doubles::workshop::Kept;
use std::path::{Path, PathBuf};

/// Where disks of single machines are.
const SLOTS: &str = "/state/clones/slots";

/// A project's repository at this GitLab.
pub(crate) fn url(project: &str) -> String {
    format!("https://gitlab.example/group/{project}.git")
}

impl World {
    /// Looks at the disks of each machine that there is.
    pub(crate) fn look_at_clones(&self) {
        for (spec, _) in self.fake.vms() {
            let Some((_, job)) = &spec.bound else { continue };
            let path = self.standin.read(|model| {
                let project = model.jobs.get(&JobId(*job))?.project;
                Some(model.projects.get(&project)?.path.clone())
            });
            let Some(own) = path.and_then(|path| path.strip_prefix("group/").map(url)) else { continue };
            for disk in &spec.read_only {
                let kept =
                    self.files.look(&disk.path, |bytes| serde_json::from_slice::<Kept>(bytes.unwrap_or_default()).ok());
                if let Some(kept) = kept.filter(|kept| kept.url != own) {
                    self.story.violate(12, format!("the machine of job {job} has objects of {}", kept.url));
                }
            }
        }
    }

    /// Disks of single machines that are left.
    pub(crate) fn slots(&self) -> Vec<PathBuf> {
        self.files.paths_below(Path::new(SLOTS))
    }
}
