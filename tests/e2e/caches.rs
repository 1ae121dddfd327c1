//! `cache:` from machine to machine: the ring `caches`. Each test is one daemon and the jobs of one story.
//!
//! What a job's script asks of the store by itself it asks as any program in a machine could: over a socket of bash's.

use crate::lab::{Lab, Options};
use dayfly::cache::{Caches, Key, Tenant};
use dayfly::clock::Clock;
use dayfly::config::Cache;
use dayfly::files::RealFiles;
use dayfly::gitlab::JobId;
use dayfly::rng::Rng;
use dayfly_exec::standin::{JobSpec, JobState};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;

/// Functions of a script: `answer METHOD PATH [HEADER]` prints status and body of an answer, `put PATH FILE` its status.
const CLIENT: &str = r#"
answer() {
  exec 9<>/dev/tcp/192.0.2.1/80
  printf '%s %s HTTP/1.1\r\nHost: 192.0.2.1\r\nContent-Length: 0\r\n%b\r\n' "$1" "$2" "${3:-}" >&9
  local line length=0 status
  read -r -u 9 _ status _
  while read -r -u 9 line; line=${line%$'\r'}; [ -n "$line" ]; do
    case ${line,,} in content-length:*) length=${line#*: } ;; esac
  done
  printf '%s ' "$status"
  [ "$1" = HEAD ] || head -c "$length" <&9
  exec 9>&-
}
put() {
  exec 9<>/dev/tcp/192.0.2.1/80
  printf 'PUT %s HTTP/1.1\r\nHost: 192.0.2.1\r\nContent-Length: %s\r\nConnection: close\r\n\r\n' "$1" "$(stat -c %s "$2")" >&9
  cat "$2" >&9
  head -n 1 <&9 | cut -d' ' -f2
  exec 9>&-
}
store=/cache/project/$CI_PROJECT_ID
"#;

fn with(mut spec: JobSpec, cache: Value) -> JobSpec {
    spec.cache = Some(cache);
    spec
}

fn entry(key: &str, policy: &str) -> Value {
    json!({"key": key, "paths": ["deps/"], "policy": policy, "when": "on_success"})
}

async fn succeeded(lab: &Lab, job: JobId) -> String {
    lab.until(job, JobState::Success).await;
    lab.trace(job)
}

#[track_caller]
fn says(trace: &str, text: &str) {
    assert!(trace.contains(text), "no {text:?} in\n{trace}");
}

/// Nothing was set up for it. Miss and save; a hit in the next machine, which may only read; a fallback key after that.
#[tokio::test(flavor = "multi_thread")]
async fn a_cache_is_there_in_the_next_jobs_machine() {
    let mut lab = Lab::start(Options::default()).await;
    let make = ["test ! -e deps", "mkdir deps", "head -c 3000000 /dev/urandom >deps/blob", "sha256sum deps/blob"];
    let first = lab.enqueue(with(lab.spec(&make), json!([entry("deps", "pull-push")])));
    let made = succeeded(&lab, first).await;
    says(&made, "cache: miss (deps-non_protected)");
    says(&made, "cache: saved, ");
    let change = ["sha256sum deps/blob", "echo changed >deps/blob"];
    let second = lab.enqueue(with(lab.spec(&change), json!([entry("deps", "pull")])));
    let found = succeeded(&lab, second).await;
    says(&found, "cache: hit, ");
    assert!(!found.contains("cache: saved"), "{found}");
    let mut other = entry("other", "pull-push");
    other["fallback_keys"] = json!(["none", "deps"]);
    let third = lab.enqueue(with(lab.spec(&["sha256sum deps/blob"]), json!([other])));
    let fallback = succeeded(&lab, third).await;
    for text in [
        "cache: miss (other-non_protected)",
        "cache: miss (none-non_protected)",
        "(deps-non_protected)",
        "cache: saved, ",
    ] {
        says(&fallback, text);
    }
    let digest = |trace: &str| {
        trace.lines().find_map(|line| {
            line.split("  deps/blob").next()?.rsplit(' ').next().filter(|word| word.len() == 64).map(str::to_owned)
        })
    };
    let digests = [&made, &found, &fallback].map(|trace| digest(trace));
    assert!(digests[0].is_some() && digests.iter().all(|found| *found == digests[0]), "{digests:?}\n{fallback}");
    let list: Value = serde_json::from_str(&lab.says(&["cache", "show", "--json", "group/project"])).unwrap();
    let keys: BTreeSet<&str> = list["entries"].as_array().unwrap().iter().filter_map(|e| e["key"].as_str()).collect();
    assert_eq!(keys, BTreeSet::from(["deps-non_protected", "other-non_protected"]), "{list}");
    lab.until_released().await;
    says(&lab.says(&["job", "show", &third.to_string()]), "cache: hit, ");
    says(&lab.says(&["cache", "clear", "group/project"]), "2 caches, ");
    says(&lab.says(&["cache", "list"]), "no caches are kept yet");
    lab.assert_clean().await;
}

/// What was saved is one job's or the other's, never something of both.
#[tokio::test(flavor = "multi_thread")]
async fn two_jobs_save_one_key_at_once_and_what_is_there_is_of_one_of_them() {
    let mut lab = Lab::start(Options { concurrent: 2, ..Options::default() }).await;
    let make = [
        "mkdir deps",
        "head -c 8000000 /dev/urandom >deps/blob",
        "sha256sum deps/blob >deps/sum",
        "echo $CI_JOB_ID >deps/job",
    ];
    let cache = json!([entry("both", "push")]);
    let both = [0, 1].map(|_| lab.enqueue(with(lab.spec(&make), cache.clone())));
    for job in both {
        says(&succeeded(&lab, job).await, "cache: saved, ");
    }
    let look = ["sha256sum -c deps/sum", "echo saved by job $(cat deps/job)"];
    let third = lab.enqueue(with(lab.spec(&look), json!([entry("both", "pull")])));
    let trace = succeeded(&lab, third).await;
    assert!(both.iter().any(|job| trace.contains(&format!("saved by job {job}"))), "{trace}");
    lab.assert_clean().await;
}

/// 300 MiB, in the next machine fetched as the helper fetches what is large: ranges of 16 MiB, 16 at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_cache_is_fetched_in_ranges() {
    let mut lab = Lab::start(Options::default()).await;
    let save = format!(
        "{CLIENT}\nhead -c 314572800 /dev/urandom >blob\nput $store/large blob\necho \"cksum $(cksum <blob)\"\n"
    );
    let first = lab.job(&[&save]);
    let made = succeeded(&lab, first).await;
    says(&made, "cache: saved, 300.0 MiB in ");
    let fetch = format!(
        "{CLIENT}\n{}",
        r#"
one() {
  local last=$((($1 + 1) * 16777216 - 1))
  [ $last -lt 314572800 ] || last=314572799
  answer GET $store/large "Range: bytes=$(($1 * 16777216))-$last\r\n" >part.$1
  case $(head -c 4 part.$1) in "206 ") ;; *) echo "part $1: $(head -c 200 part.$1)"; exit 1 ;; esac
}
for n in $(seq 0 15); do one $n & done
wait
for n in 16 17 18; do one $n & done
wait
for n in $(seq 0 18); do tail -c +5 part.$n; done >blob
echo "cksum $(cksum <blob)"
"#
    );
    let second = lab.job(&[&fetch]);
    let found = succeeded(&lab, second).await;
    says(&found, "cache: hit, 300.0 MiB in ");
    let sum = |trace: &str| {
        let line = trace.lines().find(|line| line.contains(" cksum ") && line.contains("314572800"));
        line.and_then(|line| line.split(" cksum ").nth(1).map(|sum| sum.trim().to_owned()))
    };
    assert!(sum(&made).is_some() && sum(&made) == sum(&found), "{made}\n{found}");
    lab.until_released().await;
    assert_eq!(
        fs::read_dir(lab.dir.path().join("state/cache/pins")).unwrap().count(),
        0,
        "the job's file goes with it"
    );
    lab.assert_clean().await;
}

/// R15, K19: killed in the middle of a save: the cache of before, whole, for that job and for the next one.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_in_the_middle_of_a_save_leaves_the_cache_of_before() {
    let mut lab = Lab::start(Options::default()).await;
    let script = format!(
        "{CLIENT}\n{}",
        r#"
echo "the first value" >first
echo "first: $(put $store/k first)"
exec 9<>/dev/tcp/192.0.2.1/80
printf 'PUT %s HTTP/1.1\r\nHost: 192.0.2.1\r\nContent-Length: 8000000\r\n\r\n' "$store/k" >&9
head -c 4000000 /dev/zero >&9
echo half is there
head -n 1 <&9 || true
exec 9>&-
echo "after: $(answer GET $store/k)"
echo "the second value" >second
echo "second: $(put $store/k second)"
"#
    );
    let job = lab.job(&[&script]);
    lab.until_trace(job, "half is there").await;
    assert_eq!(lab.stop_daemon("KILL").await, None);
    let zips = |lab: &Lab| {
        let mut zips = 0;
        let mut left = vec![lab.dir.path().join("state/cache")];
        while let Some(dir) = left.pop() {
            for entry in fs::read_dir(dir).unwrap().flatten() {
                match entry.file_type().unwrap().is_dir() {
                    true => left.push(entry.path()),
                    false => zips += usize::from(entry.path().extension().is_some_and(|e| e == "zip")),
                }
            }
        }
        zips
    };
    assert_eq!(zips(&lab), 2, "the first value, and half of another");
    lab.start_daemon().await;
    let trace = succeeded(&lab, job).await;
    for text in ["first: 200", "after: 200 the first value", "second: 200"] {
        says(&trace, text);
    }
    let next = lab.job(&[&format!("{CLIENT}\necho \"next: $(answer GET $store/k)\"\n")]);
    says(&succeeded(&lab, next).await, "next: 200 the second value");
    assert_eq!(zips(&lab), 1);
    lab.assert_clean().await;
}

/// A file system of the caches' own that is too small, and a quota: a job's log says so, and it goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_or_a_quota_costs_a_job_its_cache_and_no_more() {
    let mut lab = Lab::start(Options { cache_mib: Some(8), ..Options::default() }).await;
    let script = format!(
        "{CLIENT}\n{}",
        r#"
head -c 3000000 /dev/urandom >small
head -c 12000000 /dev/urandom >large
echo "small: $(put $store/small small)"
echo "large: $(put $store/large large)"
exec 9<>/dev/tcp/192.0.2.1/80
printf 'PUT %s HTTP/1.1\r\nHost: 192.0.2.1\r\nContent-Length: 6000000000\r\n\r\n' "$store/huge" >&9
echo "huge: $(head -n 1 <&9 | cut -d' ' -f2)"
exec 9>&-
answer GET $store/small | tail -c +5 | cmp - small && echo small is whole
"#
    );
    let job = lab.job(&[&script]);
    let trace = succeeded(&lab, job).await;
    for text in [
        "small: 200",
        "large: 403",
        "huge: 413",
        "small is whole",
        "cache: not saved, there is no room for it here (large)",
        "cache: not saved, it is larger than a project may have here (huge)",
    ] {
        says(&trace, text);
    }
    lab.assert_clean().await;
}

/// T18: other projects' ids, protected keys, other buckets, steps up, in all spellings: nothing is read.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_forges_reads_nothing_of_others() {
    let mut lab = Lab::stopped(Options::default()).await;
    // What is there of before: of another project, and of protected refs of its own.
    let (others, own) = (77_777, lab.project.0);
    let config = (Cache::default().settings(), 0);
    let parts = (Clock::system(), Rng::system());
    let directory = lab.dir.path().join("state/cache");
    let caches = Caches::open(Arc::new(RealFiles), directory, config, parts, &BTreeSet::new()).await.unwrap();
    for (project, key) in
        [(others, "k"), (others, "deps-protected"), (own, "deps-protected"), (own, "k-non_protected-protected")]
    {
        let job = caches.of(Tenant::new(&lab.gitlab(), project, Some(true)), 1, "before");
        let (_, key) = Key::of_path(&format!("/cache/project/{project}/{key}")).unwrap();
        let mut save = job.save(&key, 12).await.unwrap();
        save.put("confidential".into()).await.unwrap();
        save.commit().await.unwrap();
    }
    drop(caches);
    lab.start_daemon().await;
    let script = format!(
        "{CLIENT}\n{}",
        r#"
tried=0 read=0 written=0
echo poison >poison
for path in \
  /cache/project/77777/k /cache/project/77777/deps-protected /cache/project/077777/k /cache/project/+77777/k \
  /cache/project/77777%2fk /cache/project/%37%37%37%37%37/k /cache/project/77777//k /cache//project/77777/k \
  $store/../77777/k $store/..%2f77777%2fk $store/%2e%2e/77777/k $store/a/../../77777/k $store/..\\77777\\k \
  $store/%5c..%5c77777 $store/./k $store/k%00 $store/deps-protected $store/%64eps-protected $store/deps%2dprotected \
  $store/k-non_protected-protected /other/project/77777/k /cache/runner/abc/project/77777/k /cache/project/ /cache/ \
  /cache/project/77777 /project/77777/k /cache/project/18446744073709629393/k "/cache/project/77777/k?project=$CI_PROJECT_ID" \
  "/cache/project/77777/k?X-Amz-Signature=0" /CACHE/project/77777/k /cache/Project/77777/k
do
  for method in GET HEAD; do
    tried=$((tried + 1))
    got=$(answer $method "$path" | tr -d '\0')
    case $got in *confidential* | 200* | 206*) read=$((read + 1)); echo "read $path: $got" ;; esac
  done
  case $path in *77777*) tried=$((tried + 1)); [ "$(put "$path" poison)" != 200 ] || { written=$((written + 1)); echo "written $path"; } ;; esac
done
echo "forged $tried, read $read, written $written"
"#
    );
    let job = lab.job(&[&script]);
    let trace = succeeded(&lab, job).await;
    let line = trace.lines().find_map(|line| Some(line.split_once(" forged ")?.1.to_owned())).unwrap_or_default();
    let numbers: Vec<u64> = line.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect();
    let [tried, read, written] = numbers[..] else { panic!("{trace}") };
    println!(
        "figure cache.forged_tried {tried}\nfigure cache.forged_reads {read}\nfigure cache.forged_writes {written}"
    );
    assert!(tried >= 80 && (read, written) == (0, 0), "{trace}");
    lab.assert_clean().await;
}
