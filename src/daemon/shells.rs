//! Who may look inside of a job's machine, and what is needed for it? Asked once for each shell.

use crate::config::Config;
use crate::control::{Opened, ShellWish, user_id};
use crate::image::manifest::Ability;
use crate::image::store::Images;
use crate::job::journal::Journal;
use crate::job::{JobView, Parts};
use crate::machine_spec::ImageRef;
use crate::rng::Rng;
use crate::shell::{Inside, Recordings, Shell, ShellOutcome, Whose};
use crate::supply::Supply;
use crate::telemetry::chain;
use dayfly_guest_config::{GuestConfig, Pass, plain_term};
use rustix::process::geteuid;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

/// The system's administrator.
const ROOT: u32 = 0;

pub(super) struct Shells {
    supply: Supply,
    journal: Journal,
    images: Arc<dyn Images>,
    rng: Rng,
    recordings: Recordings,
    /// User ids that may, besides root and our own; exchanged at a reload, held for a line.
    users: Mutex<BTreeSet<u32>>,
}

impl Shells {
    pub(super) fn new(recordings: Recordings, parts: &Parts) -> Self {
        Self {
            supply: parts.supply.clone(),
            journal: parts.journal.clone(),
            images: parts.images.clone(),
            rng: parts.rng.clone(),
            recordings,
            users: Mutex::default(),
        }
    }

    /// Who may, and for how long recordings are kept. A name that is nobody's is said and left out.
    pub(super) fn set(&self, config: &Config) {
        let mut users = BTreeSet::new();
        for name in &config.control.shell_users {
            match user_id(name) {
                Ok(user) => {
                    users.insert(user);
                }
                Err(error) => tracing::error!(
                    user = name,
                    error = chain(&error),
                    "let a user open shells (`control.shell_users`)"
                ),
            }
        }
        *self.users.lock().unwrap_or_else(PoisonError::into_inner) = users;
        self.recordings.set_keep(config.history.shell_keep.get());
    }

    fn may(&self, user: u32) -> bool {
        let listed = self.users.lock().unwrap_or_else(PoisonError::into_inner).contains(&user);
        listed || user == ROOT || user == geteuid().as_raw()
    }

    /// A shell in this job's machine, or why there is none.
    pub(super) async fn open(&self, wish: ShellWish<'_>, view: &JobView) -> Opened {
        match self.prepare(wish, view).await {
            Ok(shell) => {
                let recording = shell.recording.path().display().to_string();
                Opened::Yes(ShellOutcome::Opened { runner: view.key.runner.clone(), recording }, Box::new(shell))
            }
            Err(why) => Opened::No(ShellOutcome::Refused { why }),
        }
    }

    async fn prepare(&self, wish: ShellWish<'_>, view: &JobView) -> Result<Shell, String> {
        if !self.may(wish.user) {
            return Err(format!("user id {} is not root and not among `control.shell_users`", wish.user));
        }
        let Some(machine) = view.machine.as_ref().filter(|_| view.vm.is_some()) else {
            return Err(format!("the job has no machine ({})", view.state));
        };
        let image = ImageRef { name: machine.image.clone(), digest: machine.digest.clone() };
        // An image that is gone, or has become another: the guest program answers or does not.
        if let Ok(image) = self.images.load_version(&image).await
            && !image.manifest.can(Ability::Shell)
        {
            return Err(format!(
                "image `{0}` was built before machines gave shells: rebuild it with `dayfly image build {0}`, and jobs from then on do",
                image.name
            ));
        }
        let line = self
            .journal
            .guest(&view.key)
            .await
            .map_err(|error| format!("what its machine was told is not there: {}", chain(&error)))?;
        let config = GuestConfig::from_line(&line).map_err(|error| chain(&error))?;
        let (Ok(vm), Some(pass)) = (config.vm.parse(), Pass::from_text(&config.pass)) else {
            return Err("what its machine was told cannot be read".to_owned());
        };
        let whose =
            Whose { job: view.key.to_string(), file: view.key.directory(), vm: format!("df-{vm}"), user: wish.user };
        let recording = self
            .recordings
            .begin(&whose, wish.size)
            .await
            .map_err(|error| format!("it cannot be recorded: {}", chain(&error)))?;
        let inside = Inside {
            sockets: self.supply.host().sockets.clone(),
            directory: self.supply.setup().socket_dir.clone(),
            vm,
            pass: pass.for_shell(),
            rng: self.rng.clone(),
        };
        Ok(Shell { inside, recording, size: wish.size, term: plain_term(wish.term) })
    }
}
