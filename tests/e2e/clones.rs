//! What the host has of a repository is in a job's machine: a real git in a real guest, and GitLab's own protocol.

use crate::lab::{Lab, Options, run};
use dayfly::gitlab::JobId;
use dayfly_exec::standin::{JobSpec, JobState, Variable};
use std::path::{Path, PathBuf};

const SWITCHED_ON: &str = "[clones]\nenabled = true\nfetch_deadline = \"4m\"";

async fn lab(class: &'static str) -> Lab {
    let lab = Lab::start(Options { limits: SWITCHED_ON, class, ..Options::default() }).await;
    lab.standin.configure(|settings| settings.smart_git = true);
    lab
}

/// Bytes that GitLab has sent to jobs by git.
fn sent(lab: &Lab) -> u64 {
    lab.standin.read(|model| model.metrics.git_bytes)
}

fn spec(lab: &Lab, sha: &str, depth: u64, script: &[&str]) -> JobSpec {
    let mut spec = lab.spec(script);
    spec.sha = sha.to_owned();
    spec.refspecs = Some(vec!["+refs/heads/main:refs/remotes/origin/main".into()]);
    spec.depth = Some(depth);
    spec
}

/// Commits so many files of random bytes to the lab's repository; the last commit.
fn commit(lab: &Lab, commits: usize, bytes: usize) -> String {
    let import = lab.dir.path().join("import.py");
    let text = "import os,subprocess,sys
n,size,repository=int(sys.argv[1]),int(sys.argv[2]),sys.argv[3]
head=subprocess.run(['git','-C',repository,'rev-parse','refs/heads/main'],capture_output=True,text=True).stdout.strip()
p=subprocess.Popen(['git','-C',repository,'fast-import','--quiet','--force'],stdin=subprocess.PIPE)
w=p.stdin.write
for i in range(n):
    d=os.urandom(size)
    w(b'commit refs/heads/main\\nmark :%d\\ncommitter t <t@t.invalid> %d +0000\\ndata 2\\nm\\n'%(i+1,1700000000+i))
    w(b'from :%d\\n'%i if i else b'from %s\\n'%head.encode())
    w(b'M 100644 inline f%d\\ndata %d\\n'%(i%40,len(d))); w(d); w(b'\\n')
p.stdin.close(); sys.exit(p.wait())
";
    std::fs::write(&import, text).unwrap();
    let repository = lab.dir.path().join("repository.git");
    let (import, repository) = (import.display().to_string(), repository.display().to_string());
    let imported = run("python3", &[&import, &commits.to_string(), &bytes.to_string(), &repository]);
    assert!(imported.status.success(), "{}", String::from_utf8_lossy(&imported.stderr));
    let head = run("git", &["-C", &repository, "rev-parse", "refs/heads/main"]);
    String::from_utf8(head.stdout).unwrap().trim().to_owned()
}

/// What a job does with its clone, whatever is where.
const USE: [&str; 8] = [
    "git log --oneline | wc -l",
    "test ! -e .git/objects/info/alternates",
    "git status --short",
    "git fsck --connectivity-only",
    "git -c gc.auto=0 gc --quiet",
    "git -c user.name=t -c user.email=t@t.invalid commit --quiet --allow-empty -m job",
    "git init --quiet --bare ../pushed.git && git -C ../pushed.git config receive.shallowUpdate true && git push --quiet ../pushed.git HEAD:refs/heads/job",
    "find .git/objects -name '*.pack' -size +1000k | wc -l",
];

async fn ended(lab: &Lab, spec: JobSpec) -> (JobId, String, u64) {
    let before = sent(lab);
    let job = lab.enqueue(spec);
    lab.until(job, JobState::Success).await;
    (job, lab.trace(job), sent(lab) - before)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_finds_what_its_host_has_of_the_repository() {
    let mut lab = lab("").await;
    let sha = commit(&lab, 40, 100 * 1024);
    // While its machine boots the host fetches: nothing is left for the job.
    let (_, trace, bytes) = ended(&lab, spec(&lab, &sha, 0, &USE)).await;
    println!("figure clone.bytes.first {bytes}");
    assert!(trace.contains("were fetched while the machine booted"), "{trace}");
    assert!(bytes < 100_000, "{bytes}\n{trace}");
    // One commit more; and a clone of depth 20.
    let sha = commit(&lab, 1, 100 * 1024);
    let (_, trace, bytes) = ended(&lab, spec(&lab, &sha, 20, &USE)).await;
    println!("figure clone.bytes.second {bytes}");
    assert!(trace.contains("were here already"), "{trace}");
    assert!(bytes < 250_000, "{bytes}\n{trace}");
    // And one that wants nothing of it.
    let off = spec(&lab, &sha, 0, &USE).with_variable(Variable::new("DAYFLY_CLONE", "off"));
    let (_, trace, bytes) = ended(&lab, off).await;
    assert!(!trace.contains("clone:") && bytes > 4_000_000, "{bytes}\n{trace}");
    assert!(!trace.contains("object directory"), "{trace}");
    lab.assert_clean().await;
    let slots = std::fs::read_dir(lab.dir.path().join("state/clones/slots")).map_or(0, Iterator::count);
    assert_eq!(slots, 0, "gone with their machines");
}

/// T40: refused by GitLab, damaged on the host: each job has all of its repository all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_fetch_that_is_refused_and_a_mirror_that_is_damaged_cost_a_job_nothing_but_time() {
    let mut lab = lab("").await;
    let sha = commit(&lab, 10, 100 * 1024);
    lab.standin.configure(|settings| settings.refuse_git_of = Some("dayfly/".into()));
    let (_, trace, bytes) = ended(&lab, spec(&lab, &sha, 0, &USE)).await;
    assert!(trace.contains("GitLab did not let this host fetch what is new there"), "{trace}");
    assert!(bytes > 1_000_000, "{bytes}\n{trace}");
    lab.standin.configure(|settings| settings.refuse_git_of = None);
    ended(&lab, spec(&lab, &sha, 0, &USE)).await;
    until_mirrored(lab.dir.path()).await;
    // The disk that the next job would have.
    let whole = files(&lab, "img");
    let [disk] = whole.as_slice() else { panic!("{whole:?}") };
    damage(disk);
    let (_, trace, _) = ended(&lab, spec(&lab, &sha, 0, &USE)).await;
    assert!(!trace.contains("were here already"), "{trace}");
    until_mirrored(lab.dir.path()).await;
    assert!(!files(&lab, "img").contains(disk), "made anew");
    // And a pack of the mirror, of which the next disk would be made.
    let [mirror] = files(&lab, "git").try_into().expect("one mirror");
    let packs = std::fs::read_dir(mirror.join("objects/pack")).unwrap().map(|entry| entry.unwrap().path());
    for pack in packs.filter(|path| path.extension().is_some_and(|end| end == "pack")) {
        damage(&pack);
    }
    let sha = commit(&lab, 1, 100 * 1024);
    let (_, trace, _) = ended(&lab, spec(&lab, &sha, 0, &USE)).await;
    assert!(trace.contains("were here already; what is new there could not be fetched"), "{trace}");
    assert_eq!(files(&lab, "git"), [] as [PathBuf; 0], "the next job's mirror is a new one");
    lab.assert_clean().await;
}

/// Files of the mirrors with this ending.
fn files(lab: &Lab, ending: &str) -> Vec<PathBuf> {
    let projects = std::fs::read_dir(lab.dir.path().join("state/clones")).unwrap().map(|entry| entry.unwrap().path());
    let entries = projects.filter(|path| !path.ends_with("slots")).flat_map(|path| std::fs::read_dir(path).unwrap());
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|end| end == ending)).collect()
}

/// Some bytes in the middle are others than they were.
fn damage(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 64].iter_mut().for_each(|byte| *byte ^= 0x55);
    // As the disk would do it: in place, whatever the file's rights are.
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// Seconds from the first line about the sources to the job's own first line, by the times of the log.
fn clone_seconds(trace: &str) -> f64 {
    let at = |text: &str| {
        let line = trace.lines().find(|line| line.contains(text)).unwrap_or_else(|| panic!("no {text:?}\n{trace}"));
        line.split(' ').next().unwrap().parse::<jiff::Timestamp>().unwrap()
    };
    at("cloned-all-of-it").duration_since(at("Fetching changes")).as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A measurement, for `scripts/bench clones`: 200 MiB of history in a thousand commits, the mirror one commit behind.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement: scripts/bench clones"]
async fn bench_clones() {
    let pairs: usize = std::env::var("DAYFLY_BENCH_PAIRS").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    let mut lab = lab("").await;
    let mut sha = commit(&lab, 1000, 210 * 1024);
    let script = ["echo cloned-all-of-it"];
    // The mirror is made by a first job, and is there for the next one whether that waits for it or not.
    ended(&lab, spec(&lab, &sha, 20, &script)).await;
    until_mirrored(lab.dir.path()).await;
    let off = |spec: JobSpec| spec.with_variable(Variable::new("DAYFLY_CLONE", "off"));
    for (depth, name) in [(0, "full"), (20, "depth20")] {
        let (mut bytes, mut times) = (Vec::new(), Vec::new());
        for _ in 0..pairs {
            sha = commit(&lab, 1, 210 * 1024);
            let (_, with, with_bytes) = ended(&lab, spec(&lab, &sha, depth, &script)).await;
            assert!(with.contains("were here already"), "{with}");
            let (_, without, without_bytes) = ended(&lab, off(spec(&lab, &sha, depth, &script))).await;
            bytes.push(with_bytes as f64 / without_bytes as f64);
            times.push(clone_seconds(&with) / clone_seconds(&without));
            println!(
                "{name}: {with_bytes} of {without_bytes} bytes, {:.1} of {:.1} s",
                clone_seconds(&with),
                clone_seconds(&without)
            );
        }
        println!("figure clone.bytes_ratio.{name} {:.4}", median(bytes));
        println!("figure clone.time_ratio.{name} {:.3}", median(times));
    }
    lab.assert_clean().await;
}

/// Waits until the mirror names a disk.
async fn until_mirrored(dir: &Path) {
    let named = || {
        let projects = std::fs::read_dir(dir.join("state/clones")).into_iter().flatten().flatten();
        projects
            .map(|entry| entry.path().join("mirror.json"))
            .any(|path| std::fs::read_to_string(path).is_ok_and(|text| text.contains(".img")))
    };
    for _ in 0..600 {
        if named() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
    panic!("no mirror");
}
