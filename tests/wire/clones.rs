//! Mirrors by a real git, over HTTPS: what is fetched, who is refused, what stays out; and what git in a job makes of the
//! disks.

use crate::gitlab_tls_server::{Ca, server_config};
use dayfly::clock::Clock;
use dayfly::clones::RealWorkshop;
use dayfly::clones::workshop::{Contents, Fetch, FetchError, Held, Workshop as _};
use dayfly::gitlab::JobId;
use dayfly::rng::Rng;
use dayfly::secret::Secret;
use dayfly_exec::standin::{JobSpec, JobState, Served, Standin, serve};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

/// GitLab over HTTPS with a repository of so many commits, and a job that runs.
struct World {
    dir: tempfile::TempDir,
    standin: Standin,
    served: Served,
    job: JobId,
    token: Secret,
}

#[expect(clippy::disallowed_methods, reason = "the test's own git")]
fn git(dir: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Result<String, String> {
    let mut command = Command::new("git");
    command.current_dir(dir).args(arguments).envs(environment.iter().copied());
    command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_TERMINAL_PROMPT", "0");
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if output.status.success() { Ok(text) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

fn commit(work: &Path, name: &str, bytes: usize, rng: &Rng) -> String {
    let random: Vec<u8> = std::iter::repeat_with(|| rng.bytes::<1024>()).take(bytes / 1024).flatten().collect();
    std::fs::write(work.join(name), random).unwrap();
    git(work, &["add", "."], &[]).unwrap();
    let author = ["-c", "user.name=t", "-c", "user.email=t@t.invalid", "commit", "-q", "-m", name];
    git(work, &author, &[]).unwrap();
    git(work, &["push", "-q", "../repository.git", "HEAD:main"], &[]).unwrap();
    git(work, &["rev-parse", "HEAD"], &[]).unwrap()
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        git(dir.path(), &["init", "-q", "-b", "main", "work"], &[]).unwrap();
        git(dir.path(), &["init", "-q", "--bare", "-b", "main", "repository.git"], &[]).unwrap();
        let standin = Standin::new(Clock::system(), Rng::system());
        standin.configure(|settings| settings.smart_git = true);
        let project = standin.add_project("group/project");
        let repository = dir.path().join("repository.git");
        standin.edit(|model| model.projects.get_mut(&project).unwrap().repository = Some(repository));
        let job = standin.enqueue(project, JobSpec::script(["true"]));
        let token = Secret::new("glcbt-64_the_jobs_token");
        standin.edit(|model| {
            let job = model.jobs.get_mut(&job).unwrap();
            (job.state, job.token) = (JobState::Running, token.clone());
        });
        let ca = Ca::new("clones");
        std::fs::write(dir.path().join("ca.pem"), &ca.pem).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut config = server_config(&ca.good(), None);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        let served = serve(standin.clone(), listener, Some(Arc::new(config))).unwrap();
        Self { dir, standin, served, job, token }
    }

    fn work(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    fn mirror(&self) -> PathBuf {
        self.dir.path().join("mirror.git")
    }

    fn fetch(&self) -> Fetch {
        Fetch {
            url: format!("https://localhost:{}/group/project.git", self.served.address().port()).parse().unwrap(),
            token: self.token.clone(),
            refspecs: vec!["+refs/heads/main:refs/dayfly/main".into()],
            id_chars: 40,
            ca_file: Some(self.dir.path().join("ca.pem")),
            client: None,
            bytes_max: 1 << 30,
            deadline: Duration::from_secs(60),
        }
    }

    async fn mirrored(&self, fetch: &Fetch) -> Result<Held, FetchError> {
        RealWorkshop::default().fetch(&self.mirror(), fetch).await
    }

    /// What a guest makes of an image: a repository with its packs and refs.
    #[expect(clippy::disallowed_methods, reason = "debugfs reads an image without a mount")]
    fn unpack(&self, image: &Path) -> PathBuf {
        let clone = self.dir.path().join("clone");
        let dumped = self.dir.path().join("dumped");
        std::fs::create_dir_all(clone.join("objects")).unwrap();
        std::fs::create_dir_all(clone.join("refs")).unwrap();
        std::fs::create_dir_all(&dumped).unwrap();
        let dump = format!("rdump / {}", dumped.display());
        let output = Command::new("debugfs").args(["-R", &dump]).arg(image).output().unwrap();
        assert!(output.status.success());
        std::fs::rename(dumped.join("pack"), clone.join("objects/pack")).unwrap();
        std::fs::copy(dumped.join("packed-refs"), clone.join("packed-refs")).unwrap();
        std::fs::write(clone.join("HEAD"), "ref: refs/heads/none\n").unwrap();
        clone.join("objects")
    }

    /// A job's clone, as gitlab-runner makes it; bytes that GitLab sent for it.
    fn job_clones(&self, name: &str, sha: &str, depth: Option<u32>, alternates: Option<&Path>) -> u64 {
        let before = self.standin.read(|model| model.metrics.git_bytes);
        let clone = self.dir.path().join(name);
        git(self.dir.path(), &["init", "-q", name], &[]).unwrap();
        let port = self.served.address().port();
        let url = format!("https://gitlab-ci-token:{}@localhost:{port}/group/project.git", self.token.expose());
        let ca = self.dir.path().join("ca.pem").display().to_string();
        let alternates = alternates.map(|path| path.display().to_string());
        let mut environment = vec![("GIT_SSL_CAINFO", ca.as_str())];
        environment.extend(alternates.iter().map(|path| ("GIT_ALTERNATE_OBJECT_DIRECTORIES", path.as_str())));
        let depth = depth.map(|depth| format!("--depth={depth}"));
        let refspecs = [format!("+{sha}:refs/pipelines/1"), "+refs/heads/main:refs/remotes/origin/main".to_owned()];
        let mut fetch = vec!["fetch", "-q", "--no-recurse-submodules"];
        fetch.extend(depth.as_deref());
        fetch.push(&url);
        fetch.extend(refspecs.iter().map(String::as_str));
        let run = |arguments: &[&str]| git(&clone, arguments, &environment).unwrap();
        run(&fetch);
        run(&["checkout", "-q", "-f", sha]);
        assert_eq!(run(&["rev-parse", "HEAD"]), sha);
        // What jobs do with it: look, tidy up, commit, push.
        run(&["status", "--short"]);
        run(&["fsck", "--connectivity-only"]);
        run(&["-c", "gc.auto=0", "gc", "-q"]);
        run(&[
            "-c",
            "user.name=t",
            "-c",
            "user.email=t@t.invalid",
            "commit",
            "-q",
            "--allow-empty",
            "-m",
            "of the job",
        ]);
        let target = self.dir.path().join("pushed.git");
        git(self.dir.path(), &["clone", "-q", "--bare", "repository.git", "pushed.git"], &[]).ok();
        run(&["push", "-q", &target.display().to_string(), &format!("HEAD:refs/heads/{name}")]);
        assert!(!clone.join(".git/objects/info/alternates").exists());
        self.standin.read(|model| model.metrics.git_bytes) - before
    }
}

/// A whole history is fetched by the job's token; a job then fetches what is new, with any depth, and its clone is as any.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_fetches_only_what_its_host_has_not_got() {
    let world = World::new().await;
    let rng = Rng::seeded(7);
    for n in 0..30 {
        commit(&world.work(), &format!("file-{}", n % 10), 100 * 1024, &rng);
    }
    let workshop = RealWorkshop::default();
    let held = workshop.fetch(&world.mirror(), &world.fetch()).await.unwrap();
    assert_eq!(held.packs.len(), 1, "{held:?}");
    assert!(held.packs[0].bytes > 3_000_000);
    assert_eq!(held.tips, [git(&world.work(), &["rev-parse", "HEAD"], &[]).unwrap()]);
    assert!(world.standin.read(|model| model.metrics.git_bytes_host) > 3_000_000);
    let image = world.dir.path().join("disk.img");
    let contents = Contents { packs: &held.packs, all: &held.packs, tips: &held.tips };
    workshop.build(&world.mirror(), contents, &image).await.unwrap();
    let objects = world.unpack(&image);
    // GitLab is one commit further.
    let sha = commit(&world.work(), "file-0", 100 * 1024, &rng);
    for (depth, most) in [(None, 0.1), (Some(20), 0.15)] {
        let name = |what| format!("{what}-{}", depth.unwrap_or(0));
        let without = world.job_clones(&name("without"), &sha, depth, None);
        let with = world.job_clones(&name("with"), &sha, depth, Some(&objects));
        let ratio = with as f64 / without as f64;
        println!("depth {depth:?}: {with} of {without} bytes, {ratio:.4}");
        assert!(ratio <= most && without > 1_500_000, "depth {depth:?}: {with} of {without}");
    }
    // The next fetch brings what is new, as a pack of its own.
    let held = workshop.fetch(&world.mirror(), &world.fetch()).await.unwrap();
    assert_eq!((held.packs.len(), &held.tips[0]), (2, &sha));
    // And a mirror of many small packs is one of few.
    let fewer = workshop.tidy(&world.mirror()).await.unwrap();
    assert!(fewer.packs.len() <= 2 && fewer.tips == held.tips);
    world.served.stop().await;
}

/// T40: a token that opens nothing, a host that is another, a redirect, a size, a time: nothing comes of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_goes_to_gitlab_alone_and_within_its_bounds() {
    let world = World::new().await;
    let rng = Rng::seeded(7);
    commit(&world.work(), "file", 4 * 1024 * 1024, &rng);
    let wrong = Fetch { token: Secret::new("glcbt-64_wrong"), ..world.fetch() };
    let refused = world.mirrored(&wrong).await.unwrap_err();
    assert_eq!(refused.word(), "refused", "{refused}");
    let large = Fetch { bytes_max: 1 << 20, ..world.fetch() };
    let too_large = world.mirrored(&large).await.unwrap_err();
    assert_eq!(too_large.word(), "too_large", "{too_large}");
    let left: Vec<_> = std::fs::read_dir(world.mirror().join("objects/pack")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
    // A certificate of nobody.
    let stranger = Fetch { ca_file: None, ..world.fetch() };
    assert!(world.mirrored(&stranger).await.is_err());
    // Other protocols, whatever the URL.
    for url in ["file:///etc", "ext::sh", "ssh://localhost/x", "git://localhost/x"] {
        let url = url.parse().unwrap();
        let error = world.mirrored(&Fetch { url, ..world.fetch() }).await.unwrap_err();
        assert!(error.to_string().contains("not allowed"), "{error}");
    }
    let bytes = world.standin.read(|model| model.metrics.git_bytes_host);
    // The job is over: so is its token.
    world.standin.edit(|model| model.jobs.get_mut(&world.job).unwrap().state = JobState::Success);
    assert_eq!(world.mirrored(&world.fetch()).await.unwrap_err().word(), "refused");
    assert_eq!(world.standin.read(|model| model.metrics.git_bytes_host), bytes);
    world.served.stop().await;
}

/// T40: GitLab that sends git elsewhere is not followed, and the token is not sent there.
#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_is_not_followed() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let world = World::new().await;
    let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let there = elsewhere.local_addr().unwrap();
    let gitlab = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = gitlab.local_addr().unwrap();
    let redirect = async move {
        loop {
            let (mut stream, _) = gitlab.accept().await.unwrap();
            let mut head = vec![0; 8192];
            let read = stream.read(&mut head).await.unwrap();
            assert!(String::from_utf8_lossy(&head[..read]).contains("Authorization: Basic "));
            let answer = format!(
                "HTTP/1.1 302 Found\r\nLocation: http://{there}/group/project.git/info/refs?service=git-upload-pack\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    };
    let url = format!("http://{here}/group/project.git").parse().unwrap();
    let fetch = Fetch { url, ca_file: None, ..world.fetch() };
    tokio::select! {
        biased;
        fetched = world.mirrored(&fetch) => assert!(fetched.is_err()),
        () = redirect => unreachable!(),
        _ = elsewhere.accept() => panic!("somebody came"),
    }
    world.served.stop().await;
}

/// T40: what a repository's author puts into it is not run and not read, and what is no object is not taken.
#[tokio::test(flavor = "multi_thread")]
async fn objects_that_are_none_are_not_taken_and_nothing_of_theirs_is_run() {
    let world = World::new().await;
    let rng = Rng::seeded(7);
    commit(&world.work(), "file", 1024, &rng);
    // A commit without an author, which a client that does not look would take.
    let tree = git(&world.work(), &["rev-parse", "HEAD^{tree}"], &[]).unwrap();
    let file = world.dir.path().join("bad");
    std::fs::write(&file, format!("tree {tree}\nauthor x\ncommitter x\n\nbad\n")).unwrap();
    let bad = ["hash-object", "-t", "commit", "-w", "--literally", &file.display().to_string()];
    let repository = world.dir.path().join("repository.git");
    let id = git(&repository, &bad, &[]).unwrap();
    git(&repository, &["update-ref", "refs/heads/main", &id], &[]).unwrap();
    let error = world.mirrored(&world.fetch()).await.unwrap_err();
    assert_eq!(error.word(), "failed", "{error}");
    // A mirror's own hooks, should somebody have put some there, are none.
    git(&world.dir.path().join("work"), &["push", "-q", "-f", "../repository.git", "HEAD:main"], &[]).unwrap();
    let hooks = world.mirror().join("hooks");
    std::fs::create_dir_all(&hooks).unwrap();
    let hook = hooks.join("reference-transaction");
    std::fs::write(&hook, format!("#!/bin/sh\ntouch {}/ran\n", world.dir.path().display())).unwrap();
    std::fs::set_permissions(&hook, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let fetch = Fetch { refspecs: vec!["+refs/heads/main:refs/dayfly/other".into()], ..world.fetch() };
    world.mirrored(&fetch).await.unwrap();
    world.served.stop().await;
    assert!(!world.dir.path().join("ran").exists());
}
