//! What a test waits for and looks at in the world, and how it must be in the end.

use super::*;

impl World {
    /// Waits until the job has this state at GitLab.
    pub async fn until(&self, job: JobId, state: JobState) {
        let reached = self.standin.wait_for(|m| m.jobs.get(&job).is_some_and(|j| j.state == state), LONG).await;
        if reached.is_err() {
            let found = self.standin.job(job).map(|j| (j.state, String::from_utf8_lossy(&j.trace.bytes).into_owned()));
            panic!("job {job} did not become {state:?}: {found:?}\n{}", self.histories());
        }
    }

    /// Waits until the job's trace at GitLab holds this text.
    pub async fn until_trace(&self, job: JobId, text: &str) {
        let reached =
            self.standin.wait_for(|m| m.jobs.get(&job).is_some_and(|j| contains(&j.trace.bytes, text)), LONG).await;
        assert!(reached.is_ok(), "no {text:?} in the trace:\n{}\n{}", self.trace(job), self.histories());
    }

    /// The job at GitLab.
    pub fn found(&self, job: JobId) -> Job {
        self.standin.job(job).expect("the job exists")
    }

    /// Waits until the job has failed at GitLab, with this reason, and the author reads this.
    pub async fn until_failed(&self, job: JobId, reason: &str, author_reads: &str) {
        self.until(job, JobState::Failed).await;
        let (found, trace) = (self.found(job), self.trace(job));
        assert_eq!(found.failure_reason.as_deref(), Some(reason), "{trace}\n{}", self.histories());
        assert!(trace.contains(author_reads), "no {author_reads:?} in the trace:\n{trace}");
    }

    /// Requests of this route so far.
    pub fn requests(&self, route: Route) -> Vec<Recorded> {
        self.standin.requests().into_iter().filter(|request| request.route == route).collect()
    }

    /// VMs that were started so far.
    pub fn machines_started(&self) -> usize {
        self.hypervisor.history().iter().filter(|entry| entry.op.is_none() && entry.outcome == "started").count()
    }

    /// The most VMs that ran at one time.
    pub fn machines_at_once(&self) -> usize {
        let (mut now, mut most) = (0_usize, 0);
        for entry in self.hypervisor.history().iter().filter(|entry| entry.op.is_none()) {
            match entry.outcome.as_str() {
                "started" => now += 1,
                "destroyed" | "powered off" | "crashed" | "gone with the host" => now -= 1,
                _ => {}
            }
            most = most.max(now);
        }
        most
    }

    /// What `dayfly status` would show.
    pub fn status(&self) -> StatusReport {
        self.daemon.as_ref().expect("a daemon runs").handler.status()
    }

    /// Waits until what `dayfly status` shows fulfils the condition.
    pub async fn until_status(&self, condition: impl Fn(&StatusReport) -> bool) {
        let wait = async {
            while !condition(&self.status()) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let reached = tokio::time::timeout(LONG, wait).await;
        assert!(reached.is_ok(), "the status is {:?}\n{}", self.status(), self.histories());
    }

    /// Waits until the only job is in this state, in the word of `dayfly status`.
    pub async fn until_word(&self, word: &str) {
        self.until_status(|status| status.jobs.iter().any(|job| job.state == word)).await;
    }

    /// SIGHUP, with this world's configuration as the file.
    pub async fn reload(&self) -> Result<(), ReloadError> {
        let reloader = self.daemon.as_ref().expect("a daemon runs").reloader.clone();
        reloader.reload(self.config.clone()).await
    }

    /// `dayfly kill --reason`.
    pub fn kill_job_for(&self, job: JobId, reason: &str) -> KillOutcome {
        self.daemon.as_ref().expect("a daemon runs").handler.kill(job, None, Some(reason.to_owned()))
    }

    /// What `dayfly jobs --ended` would show.
    pub fn ended_jobs(&self) -> Vec<JobEnd> {
        self.daemon.as_ref().expect("a daemon runs").handler.ended(1000)
    }

    /// What `dayfly job show` would.
    pub async fn job_shown(&self, job: JobId) -> JobFound {
        let handler = self.daemon.as_ref().expect("a daemon runs").handler.clone();
        handler.job(job, None).await
    }

    /// What `dayfly console` would.
    pub async fn console(&self, job: JobId, from: Option<u64>) -> ConsoleFound {
        let handler = self.daemon.as_ref().expect("a daemon runs").handler.clone();
        handler.console(job, None, from).await
    }

    /// What `dayfly metrics` would show.
    pub fn metrics(&self) -> String {
        self.daemon.as_ref().expect("a daemon runs").handler.metrics(dayfly::metrics::Form::Classic)
    }

    /// `dayfly kill`.
    pub fn kill_job(&self, job: JobId) -> KillOutcome {
        self.daemon.as_ref().expect("a daemon runs").handler.kill(job, None, None)
    }

    /// Waits until the job is over at GitLab, however. `false`: no daemon ever wrote it down.
    pub async fn until_over(&self, job: JobId) -> bool {
        let reached = self.standin.wait_for(|m| m.jobs.get(&job).is_some_and(|j| j.state.is_over()), LONG).await;
        assert!(reached.is_ok(), "job {job} is still {:?}\n{}", self.found(job).state, self.histories());
        self.files.history().iter().any(|line| line.starts_with("replace ") && line.ends_with("record.json ok"))
    }

    /// Waits until the daemon has nothing of a job left, or is dead.
    pub async fn settle(&self) {
        let Some(running) = &self.daemon else { return };
        tokio::select! {
            biased;
            () = running.life.over() => {}
            () = self.until_idle() => {}
        }
    }

    /// The job's trace at GitLab.
    pub fn trace(&self, job: JobId) -> String {
        self.standin.job(job).map(|j| String::from_utf8_lossy(&j.trace.bytes).into_owned()).unwrap_or_default()
    }

    /// Waits until nothing of a job is left on the host.
    pub async fn until_idle(&self) {
        let jobs = self.daemon.as_ref().expect("a daemon runs").jobs.clone();
        let idle = async {
            while !jobs.views().is_empty() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        let views = jobs.views();
        assert!(tokio::time::timeout(LONG, idle).await.is_ok(), "jobs are left: {views:?}\n{}", self.histories());
    }

    /// What the daemon's jobs are about.
    pub fn jobs(&self) -> Jobs {
        self.daemon.as_ref().expect("a daemon runs").jobs.clone()
    }

    /// The daemon's switch.
    pub fn shutdown(&self) -> Shutdown {
        self.daemon.as_ref().expect("a daemon runs").shutdown.clone()
    }

    /// Waits for the daemon's end after a shutdown.
    pub async fn ended(&mut self) {
        let running = self.daemon.take().expect("a daemon runs");
        tokio::time::timeout(LONG, running.task).await.expect("the daemon ends").expect("it does not panic");
    }

    /// SIGTERM, and the daemon's end.
    pub async fn hand_over(&mut self) {
        self.shutdown().hand_over();
        self.ended().await;
    }

    /// Whether this is a mirror's `mirror.json`, or named by it.
    fn is_of_a_mirror(&self, path: &Path) -> bool {
        const JSON: &str = "mirror.json";
        let mut names = path.strip_prefix(self.config.state_directory.join("clones")).into_iter().flatten();
        let (Some(project), Some(name)) = (names.next(), names.next().and_then(|name| name.to_str())) else {
            return false;
        };
        let json = self.config.state_directory.join("clones").join(project).join(JSON);
        let text = self.files.look(&json, |bytes| String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned());
        name == JSON || text.contains(&format!("\"{name}\""))
    }

    /// The host and GitLab as they must be when every job is over: one verdict each, nothing left.
    /// Drains the daemon, so that pollers hold no room either.
    pub async fn assert_clean(&mut self) {
        self.until_idle().await;
        let handler = self.daemon.as_ref().expect("a daemon runs").handler.clone();
        self.shutdown().drain();
        self.ended().await;
        let capacity = handler.status().capacity;
        let promised = (capacity.jobs, capacity.cpus, capacity.memory_mib, capacity.disk_gib);
        assert_eq!(promised, (0, 0, 0, 0), "capacity is not all back");
        let counts = self.hypervisor.counts();
        assert!(counts.is_clean(), "left behind: {counts:?}\n{}", self.histories());
        // What is kept of ended jobs is bounded by age, number and bytes.
        // So is what is kept of their consoles, and the recordings of shells.
        let bounded = ["ended", "consoles", "shells"].map(|name| self.config.state_directory.join(name));
        let kept = |path: &Path| {
            path.ends_with("installation.json")
                || bounded.iter().any(|directory| path.starts_with(directory))
                || self.is_of_a_mirror(path)
        };
        let left: Vec<_> = self.files.paths_below(Path::new("/")).into_iter().filter(|path| !kept(path)).collect();
        assert!(left.is_empty(), "files are left: {left:?}\n{}", self.histories());
        for standin in self.gitlabs.0.values() {
            // Copied out: a failing check reads the stand-in's history.
            let (jobs, invalid) =
                standin.read(|m| (m.jobs.values().cloned().collect::<Vec<_>>(), m.metrics.trace_invalid));
            for job in &jobs {
                assert!(!job.state.is_executing(), "job {} is still {:?}\n{}", job.id, job.state, self.histories());
                assert!(job.verdicts <= 1, "job {} got {} verdicts", job.id, job.verdicts);
                self.assert_exact(job);
            }
            assert_eq!(invalid, 0, "a verdict's checksum did not match\n{}", self.histories());
        }
        assert!(self.leaks().is_empty(), "secrets of the runner got out: {:?}", self.leaks());
        let unexpected = |line: &String| !self.expected.iter().any(|expected| line.contains(expected));
        let trouble: Vec<_> = self.log.trouble().into_iter().filter(unexpected).collect();
        assert!(trouble.is_empty(), "unexpected in the log:\n{}", trouble.join("\n"));
    }

    /// Where a part of a runner token was seen that is no public one, in whatever encoding (threats.md T1,
    /// invariant 7): so far in a file, on its way to a machine or in what one is made from; now in the
    /// log, in what the host shows of machines, in files, in GitLab's copies of the traces.
    pub fn leaks(&self) -> Vec<String> {
        let spy = self.spy.afresh();
        spy.look("the log", self.log.text().as_bytes());
        spy.look("the hypervisor's history", format!("{:?}", self.hypervisor.history()).as_bytes());
        for (path, bytes) in self.files.contents() {
            spy.look(&format!("a file, {}", path.display()), &bytes);
        }
        if let Some(running) = &self.daemon {
            spy.look("the status", format!("{:?}", running.handler.status()).as_bytes());
        }
        for standin in self.gitlabs.0.values() {
            for job in standin.read(|model| model.jobs.values().cloned().collect::<Vec<_>>()) {
                spy.look("GitLab's copy of a trace", &job.trace.bytes);
            }
        }
        self.spy.found().into_iter().chain(spy.found()).collect()
    }

    /// GitLab's trace is our first lines, the guest's bytes, our last lines; and nothing that the
    /// guest was promised has changed (threats.md §3.1 Exact, invariants 2, 3, 5, 6).
    fn assert_exact(&self, job: &Job) {
        let told = self.memory.of(job.token.expose());
        assert!(told.runs <= 1, "job {} was run by {} guests\n{}", job.id, told.runs, self.histories());
        let by_us = job.verdicts == 1;
        // A canceled job ends as `canceled`, whatever is reported.
        if by_us
            && job.state != JobState::Canceled
            && let Some(verdict) = &told.verdict
        {
            assert_eq!(job.state.as_str(), verdict, "the guest was promised another verdict for job {}", job.id);
        }
        if job.erased {
            return;
        }
        if let Err(why) = exact(&job.trace.bytes, &told, by_us) {
            let (held, printed) = (String::from_utf8_lossy(&job.trace.bytes), String::from_utf8_lossy(&told.printed));
            panic!(
                "job {}: {why}\n--- GitLab holds\n{held}\n--- its guest printed\n{printed}\n{}",
                job.id,
                self.histories()
            );
        }
    }

    /// What the fakes saw, for a failing test.
    pub fn histories(&self) -> String {
        let mut text = String::from("--- GitLab saw\n");
        for request in self.standin.requests().iter().rev().take(40).rev() {
            text.push_str(&format!("{request:?}\n"));
        }
        text.push_str("--- the hypervisor saw\n");
        for entry in self.hypervisor.history().iter().rev().take(60).rev() {
            text.push_str(&format!("{entry:?}\n"));
        }
        text.push_str("--- the daemon said\n");
        text.push_str(&self.log.text());
        text
    }
}

/// Compares a trace with what its guest knows. `whole`: the job ended with a verdict of ours, so all that the guest
/// was told is taken must be there.
fn exact(held: &[u8], told: &Told, whole: bool) -> Result<(), String> {
    let ours = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let alien = text.lines().find(|line| !line.is_empty() && !is_ours(line)).map(str::to_owned);
        alien.map_or(Ok(()), |line| Err(format!("a line that is neither the guest's nor ours: {line:?}")))
    };
    let first = told.printed.split_inclusive(|b| *b == b'\n').next().unwrap_or_default();
    let begin = if first.is_empty() { None } else { held.windows(first.len()).position(|window| window == first) };
    let Some(begin) = begin else {
        if whole && told.taken > 0 {
            return Err(format!("{} bytes of the guest are lost", told.taken));
        }
        return ours(held);
    };
    ours(&held[..begin])?;
    let common = held[begin..].iter().zip(&told.printed).take_while(|(a, b)| a == b).count();
    if whole && common < told.taken {
        return Err(format!("only {common} of {} bytes of the guest are there", told.taken));
    }
    ours(&held[begin + common..])
}

/// Whether a line of a trace is one of the daemon's.
fn is_ours(line: &str) -> bool {
    line.as_bytes().get(26) == Some(&b'Z') && line.get(27..31) == Some(" 00O")
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}
