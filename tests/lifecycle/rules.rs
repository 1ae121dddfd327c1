//! Rules say which jobs are taken, and in which class, before anything is made for one.

use crate::metrics::value;
use crate::support::world::paused;
use crate::wishes::{REASON, asking, generous, image, machines, world};
use dayfly::config::Class;
use dayfly::rules::Rule;
use dayfly_doubles::images::TheseImages;
use dayfly_exec::standin::{JobSpec, JobState, Route};
use serde_json::json;
use std::sync::Arc;

fn deny(name: &str, line: &str) -> Rule {
    Rule { name: name.into(), deny: Some(line.into()), ..Rule::default() }
}

fn list(one: &str) -> Vec<String> {
    vec![one.to_owned()]
}

/// The class that rules of these tests give.
fn big() -> Class {
    Class {
        name: "big".into(),
        image: "third".into(),
        images: Vec::new(),
        cpus: 2,
        memory_mib: 1024,
        max_cpus: Some(3),
        max_memory_mib: None,
        max_disk_gib: None,
        run_as_root: true,
        ..generous()
    }
}

/// A job that a rule denies gets that rule's line and no machine; the next one is taken. Both are counted, and so is what
/// a dry run would have done.
#[tokio::test(start_paused = true)]
async fn a_denied_job_ends_with_its_rules_line() {
    let mut world = world(generous());
    world.config.rule = vec![
        Rule { dry_run: true, ..deny("tried", "nobody") },
        Rule { name: "protected".into(), protected: Some(true), allow: true, ..Rule::default() },
        deny("rest", "jobs of protected branches alone run here; ask #ci for others."),
    ];
    let denied = world.job_of(asking(&[]));
    let taken = world.job_of(JobSpec { protected: true, ..asking(&[]) });
    world.start().await.unwrap();
    let line =
        "this runner does not take the job: jobs of protected branches alone run here; ask #ci for others. Ask your";
    world.until_failed(denied, REASON, line).await;
    world.until(taken, JobState::Success).await;
    assert_eq!(world.machines_started(), 1);
    let metrics = world.metrics();
    for (sample, count) in [
        ("dayfly_rule_matches_total{rule=\"tried\",action=\"dry_run\"}", 2.0),
        ("dayfly_rule_matches_total{rule=\"protected\",action=\"allow\"}", 1.0),
        ("dayfly_rule_matches_total{rule=\"rest\",action=\"deny\"}", 1.0),
    ] {
        assert_eq!(value(&metrics, sample), Some(count), "{sample}: {metrics}");
    }
    assert!(world.log.text().contains("a rule in its dry run fits a job"), "it is logged");
    world.assert_clean().await;
}

/// A rule's class is what its jobs run in, within its bounds and never beyond what was reserved.
#[tokio::test(start_paused = true)]
async fn a_job_runs_in_the_class_that_a_rule_gives() {
    let mut world = world(generous());
    world.config.class.push(big());
    world.config.rule = vec![Rule {
        name: "large".into(),
        group: list("GROUP"),
        git_ref: list("release-*"),
        min_cpus: Some(2),
        class: Some("big".into()),
        ..Rule::default()
    }];
    let release = |wishes| JobSpec { git_ref: "release-1".into(), ..asking(wishes) };
    let job = world.job_of(release(&[("DAYFLY_CPUS", "3")]));
    world.start().await.unwrap();
    world.until_trace(job, "begun").await;
    assert_eq!(machines(&world), [(3, 1024)]);
    let trace = world.trace(job);
    for line in ["  image third, 3 CPUs, 1024 MiB memory", "  machine class big, by a rule of this runner\n"] {
        assert!(trace.contains(line), "no {line:?}: {trace}");
    }
    let guest = world.files.contents().into_iter().find(|(path, _)| path.ends_with("guest")).unwrap();
    assert!(String::from_utf8_lossy(&guest.1).contains("\"user\":\"root\""), "it is the class's user");
    world.until(job, JobState::Success).await;
    // Its bounds are the rule's class's; without the wish it is the runner's class.
    let beyond = world.job_of(release(&[("DAYFLY_CPUS", "4")]));
    world.until_failed(beyond, REASON, "`DAYFLY_CPUS` asks for 4 CPUs; here jobs may have from 1 CPU to 3 CPUs").await;
    let plain = world.job_of(release(&[]));
    world.until(plain, JobState::Success).await;
    assert!(world.trace(plain).contains("  image test, 1 CPUs, 512 MiB"), "{}", world.trace(plain));
    world.assert_clean().await;
}

/// What a job could set itself decides nothing: project and user are GitLab's word.
#[tokio::test(start_paused = true)]
async fn no_variable_makes_a_job_another_projects() {
    let mut world = world(generous());
    world.config.rule = vec![
        Rule { name: "ours".into(), project: list("trusted/*"), allow: true, ..Rule::default() },
        Rule { name: "admin".into(), user_id: vec![1], allow: true, ..Rule::default() },
        deny("rest", "no"),
    ];
    let job = world.job_of(asking(&[
        ("CI_PROJECT_PATH", "trusted/project"),
        ("GITLAB_USER_ID", "1"),
        ("CI_COMMIT_REF_PROTECTED", "true"),
    ]));
    world.start().await.unwrap();
    world.until_failed(job, REASON, "this runner does not take the job: no. Ask").await;
    world.assert_clean().await;
}

/// A wish that makes no sense does not hide a job from the rules, and what `image:` names is looked at.
#[tokio::test(start_paused = true)]
async fn rules_come_before_wishes() {
    let mut world = world(generous());
    world.config.rule = vec![
        Rule { image: list("other"), ..deny("image", "other is for others") },
        Rule { container: list("node:*"), ..deny("container", "no node") },
        Rule { git_ref: list("main"), ..deny("main", "not main") },
    ];
    let by_key = world.job_of(JobSpec { image: Some(json!("other")), ..asking(&[]) });
    let by_variable = world.job_of(asking(&[("DAYFLY_IMAGE", "other")]));
    let node = world.job_of(JobSpec { image: Some(json!({"name": "node:22"})), ..asking(&[]) });
    let nonsense = world.job_of(asking(&[("DAYFLY_CPUS", "1e99")]));
    world.start().await.unwrap();
    world.until_failed(by_key, REASON, "other is for others").await;
    world.until_failed(by_variable, REASON, "other is for others").await;
    world.until_failed(node, REASON, "no node").await;
    world.until_failed(nonsense, REASON, "not main").await;
    world.assert_clean().await;
}

/// Decision D10: the image of a class that a rule may give counts in what GitLab is told, even of a rule in its dry run.
#[tokio::test(start_paused = true)]
async fn the_images_of_rules_are_among_those_that_must_be_alike() {
    let mut world = world(generous());
    world.expect_trouble(&["no job is asked for"]);
    world.config.class.push(big());
    let rule = Rule { name: "r".into(), class: Some("big".into()), dry_run: true, ..Rule::default() };
    world.config.rule = vec![rule];
    let mut odd = image("third");
    odd.manifest.info = Some(r#"{"name":"gitlab-runner","version":"19.3.0","features":{"proxy":true}}"#.into());
    world.images = Arc::new(TheseImages::new(vec![image("test"), image("other"), odd]));
    let _never = world.job(&["print never"]);
    world.start().await.unwrap();
    let named = |problem: &String| problem.contains("images `test` and `third`");
    world.until_status(|status| status.daemon.problems.iter().any(named)).await;
    assert_eq!(world.requests(Route::RequestJob).len(), 0);
    world.assert_clean().await;
}

/// A reload changes the rules for what is assigned from then on; a job that was accepted keeps its machine.
#[test]
fn rules_follow_a_reload() {
    paused(async {
        let mut world = world(generous());
        let before = world.job_of(asking(&[]));
        world.start().await.unwrap();
        world.until_trace(before, "begun").await;
        world.config.rule = vec![deny("all", "closed for today")];
        world.reload().await.unwrap();
        // What was asked for before the reload runs by the rules of before.
        tokio::time::sleep(std::time::Duration::from_secs(100)).await;
        let after = world.job_of(asking(&[]));
        world.until_failed(after, REASON, "closed for today").await;
        world.until(before, JobState::Success).await;
        world.assert_clean().await;
    });
}
