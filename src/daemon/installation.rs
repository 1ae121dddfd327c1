//! Who this installation is: an id for everything it makes, and the machine-id behind its system id.

use super::DaemonError;
use crate::files::Files;
use crate::guest_config::new_machine_id;
use crate::rng::Rng;
use crate::vm::{InstallationId, VmId};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;

/// Bytes of the file at most; a real one has about 120.
const BYTES_MAX: u64 = 4096;

/// `<state directory>/installation.json`, made at the first start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Installation {
    /// In the metadata of each domain that we make.
    pub id: InstallationId,
    /// In force in each guest while its runner starts, so that GitLab and the job's log name the
    /// same runner manager (decision D9).
    pub machine_id: String,
}

/// What tells a file of a newer dayfly from a broken one.
#[derive(Deserialize)]
struct Versioned {
    version: Option<u64>,
}

impl Installation {
    /// Reads it, or makes it.
    ///
    /// # Errors
    /// [`DaemonError::Files`]; [`DaemonError::Unusable`] for a file that makes no sense, or none
    /// beside a journal with jobs: a silent new beginning would orphan somebody's VMs.
    pub async fn open(files: &dyn Files, state_directory: &Path, rng: &Rng) -> Result<Self, DaemonError> {
        let path = state_directory.join("installation.json");
        let failed = |what| {
            let path = path.clone();
            move |source| DaemonError::Files { what, path, source }
        };
        files.create_dir(state_directory).await.map_err(failed("make the directory of"))?;
        match files.read(&path, BYTES_MAX).await {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                let newer = serde_json::from_slice::<Versioned>(&bytes).ok().and_then(|file| file.version);
                let (problem, remedy) = match newer {
                    Some(version) => (
                        format!("was written by a newer dayfly (version {version})"),
                        "install that one again, or let its jobs end first",
                    ),
                    None => (
                        format!("cannot be read ({error})"),
                        "put it back from a copy; without one, end its VMs and move the whole state directory away",
                    ),
                };
                DaemonError::Unusable { path: path.clone(), problem, remedy: remedy.into() }
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let jobs = state_directory.join("jobs");
                let orphans = files.list(&jobs).await.map_err(failed("look for the jobs beside"))?;
                if !orphans.is_empty() {
                    return Err(DaemonError::Unusable {
                        path: jobs,
                        problem: format!("holds {} jobs, and `{}` is missing", orphans.len(), path.display()),
                        remedy: "put that file back; without it, end its VMs and move the whole state directory away"
                            .into(),
                    });
                }
                let new = Self { id: VmId::random(rng), machine_id: new_machine_id(rng) };
                let bytes = serde_json::to_vec(&new).expect("two strings always serialise");
                files.replace(&path, bytes).await.map_err(failed("write"))?;
                Ok(new)
            }
            Err(source) => Err(failed("read")(source)),
        }
    }

    /// The system id of our runner managers.
    #[must_use]
    pub fn system_id(&self) -> String {
        dayfly_guest_config::system_id(&self.machine_id)
    }
}
