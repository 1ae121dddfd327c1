//! Whole pipeline files, and what becomes of them.

use super::*;
use std::time::Duration;

fn run(text: &str, names: &[&str]) -> Result<Plan, PipelineError> {
    let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
    plan(Path::new(".gitlab-ci.yml"), text, &names)
}

fn one(text: &str) -> Job {
    run(text, &["job"]).unwrap().jobs.remove(0)
}

fn fails(text: &str, expected: &str) {
    let shown = run(text, &["job"]).map_or_else(|e| e.to_string(), |plan| format!("{plan:?}"));
    assert_eq!(shown, expected, "{text}");
}

fn notes(text: &str, names: &[&str]) -> Vec<String> {
    run(text, names).unwrap().notes.iter().map(ToString::to_string).collect()
}

fn pairs(job: &Job) -> Vec<(&str, &str)> {
    job.variables.iter().map(|v| (v.key.as_str(), v.value.as_str())).collect()
}

#[test]
fn scripts_are_put_together_in_order() {
    let job = one("
default: {before_script: [d]}
.a: &a [one, [two, three]]
job:
  script:
    - *a
    - |
      four
      five
  after_script: bye
");
    assert_eq!(job.script, ["d", "one", "two", "three", "four\nfive\n"]);
    assert_eq!(job.after_script, ["bye"]);
    assert_eq!((job.stage.as_str(), job.line), ("test", Line::from(4)));
}

#[test]
fn what_is_no_script_is_refused_where_it_stands() {
    fails("job:\n  stage: test\n", ".gitlab-ci.yml:1: job `job`: key `script`: is missing; a job must say what to run");
    fails("job: {script: []}", ".gitlab-ci.yml:1: job `job`: key `script`: is missing; a job must say what to run");
    fails(
        "job:\n  script:\n    - ok\n    - echo: foo\n",
        ".gitlab-ci.yml:4: job `job`: key `script`: a command is a mapping; put commands with `: ` in quotes",
    );
    fails(
        "job:\n  script:\n    - true\n",
        ".gitlab-ci.yml:3: job `job`: key `script`: is the boolean true, must be a text; put it in quotes",
    );
    fails("job: text", ".gitlab-ci.yml:1: job `job`: is a text, must be a mapping with at least `script`");
    fails("job:\n", ".gitlab-ci.yml:1: job `job`: is empty");
    let deep = format!("job: {{script: {}x{}}}", "[".repeat(11), "]".repeat(11));
    fails(&deep, ".gitlab-ci.yml:1: job `job`: key `script`: has lists nested deeper than 10 levels");
    assert_eq!(one(&format!("job: {{script: {}x{}}}", "[".repeat(10), "]".repeat(10))).script, ["x"]);
}

#[test]
fn variables_are_texts_whatever_they_look_like() {
    let text = "
variables: {A: global, B: global, N: 12, T: {value: v, description: d, options: [v, w]}, E: }
job:
  variables:
    B: own
    RAW: {value: $A, expand: false}
    MODE: 0755
    FLAG: true
    LIST: '[1]'
  script: x
";
    let job = one(text);
    let expected = [
        ("A", "global"),
        ("B", "own"),
        ("N", "12"),
        ("T", "v"),
        ("E", ""),
        ("RAW", "$A"),
        ("MODE", "493"),
        ("FLAG", "true"),
        ("LIST", "[1]"),
    ];
    assert_eq!(pairs(&job), expected);
    assert_eq!(job.variables.iter().filter(|v| v.raw).map(|v| v.key.as_str()).collect::<Vec<_>>(), ["RAW"]);
    assert_eq!(
        notes(text, &["job"]),
        [
            "7: job `job`: key `variables:MODE`: 0755 is the number 493, as in GitLab; put it in quotes if it is a text",
            "8: job `job`: key `variables:FLAG`: GitLab refuses true without quotes; put it in quotes",
        ]
    );
    fails(
        "job: {script: x, variables: {A: [1]}}",
        ".gitlab-ci.yml:1: job `job`: key `variables:A`: is a list, must be a text or a number",
    );
    fails(
        "job: {script: x, variables: {A-B: 1}}",
        ".gitlab-ci.yml:1: job `job`: key `variables:A-B`: is no name of a variable; use letters, digits and _",
    );
    fails(
        "job: {script: x, variables: {A: {v: 1}}}",
        ".gitlab-ci.yml:1: job `job`: key `variables:A:v`: is no key of a variable; it has value, description, options and expand",
    );
}

#[test]
fn jobs_inherit_defaults_unless_they_say_otherwise() {
    let text = "
default: {timeout: 2h, image: 'ruby:3', before_script: [d], after_script: [a]}
variables: {A: 1, B: 2}
job:
  before_script:
  image: {name: alpine, entrypoint: [sh, -c]}
  inherit: {default: [timeout, before_script], variables: [B]}
  script: x
other: {script: x, inherit: {default: false, variables: false}}
third: {script: x}
";
    let job = one(text);
    assert_eq!(job.script, ["x"], "null drops what would be inherited");
    assert_eq!(job.timeout, Some(Duration::from_secs(7200)));
    assert_eq!(job.image, Some(Image { name: "alpine".into(), entrypoint: vec!["sh".into(), "-c".into()] }));
    assert_eq!((job.after_script.len(), pairs(&job)), (0, vec![("B", "2")]));
    let other = run(text, &["other"]).unwrap().jobs.remove(0);
    assert_eq!((other.script.len(), other.timeout, other.variables.len()), (1, None, 0));
    let third = run(text, &["third"]).unwrap().jobs.remove(0);
    assert_eq!((third.script, third.image.unwrap().name), (vec!["d".to_owned(), "x".to_owned()], "ruby:3".to_owned()));
}

#[test]
fn old_global_keys_are_defaults_too() {
    let job = one("before_script: [old]\njob: {script: x}");
    assert_eq!(job.script, ["old", "x"]);
    fails(
        "default: {before_script: [a]}\nbefore_script: [b]\njob: {script: x}",
        ".gitlab-ci.yml:2: key `before_script`: stands here and in `default`; GitLab takes one of them only",
    );
}

#[test]
fn artifacts_become_an_archive_and_reports() {
    let job = one("
job:
  script: x
  artifacts:
    name: bin-$CI_JOB_NAME
    paths: [out/, '*.txt']
    exclude: [out/tmp]
    untracked: true
    when: always
    expire_in: 1 week
    reports:
      junit: [a.xml, b.xml]
      dotenv: build.env
      codequality: cq.json
      coverage_report: {coverage_format: cobertura, path: c.xml}
");
    let artifacts = job.artifacts;
    assert_eq!(
        (artifacts.name.as_str(), artifacts.when.as_str(), artifacts.untracked),
        ("bin-$CI_JOB_NAME", "always", true)
    );
    assert_eq!((artifacts.paths, artifacts.exclude), (vec!["out/".into(), "*.txt".into()], vec!["out/tmp".to_owned()]));
    assert_eq!(artifacts.expire_in.as_deref(), Some("1 week"));
    let reports: Vec<_> =
        artifacts.reports.iter().map(|(kind, paths)| format!("{kind}: {}", paths.join(" "))).collect();
    assert_eq!(reports, ["junit: a.xml b.xml", "dotenv: build.env", "codequality: cq.json", "cobertura: c.xml"]);

    fails(
        "job:\n  script: x\n  artifacts:\n    path: [a]",
        ".gitlab-ci.yml:4: job `job`: key `artifacts:path`: is no key of `artifacts`; correct or remove it",
    );
    fails(
        "job: {script: x, artifacts: {paths: a}}",
        ".gitlab-ci.yml:1: job `job`: key `artifacts:paths`: is a text, must be a list",
    );
    fails(
        "job: {script: x, artifacts: {when: later}}",
        ".gitlab-ci.yml:1: job `job`: key `artifacts:when`: is `later`, must be on_success, on_failure or always",
    );
    fails(
        "job: {script: x, artifacts: {reports: {junitt: a}}}",
        ".gitlab-ci.yml:1: job `job`: key `artifacts:reports:junitt`: is no report type that GitLab knows; correct or remove it",
    );
    fails(
        "job: {script: x, artifacts: {reports: {coverage_report: {coverage_format: lcov, path: a}}}}",
        ".gitlab-ci.yml:1: job `job`: key `artifacts:reports:coverage_report:coverage_format`: is `lcov`, must be cobertura or jacoco",
    );
}

#[test]
fn failures_are_allowed_as_the_job_says() {
    let allow = |text: &str| one(&format!("job: {{script: x, allow_failure: {text}}}")).allow_failure;
    assert_eq!(allow("true"), AllowFailure::Yes);
    assert_eq!(allow("no"), AllowFailure::No);
    assert_eq!(allow("{exit_codes: 3}"), AllowFailure::ExitCodes(vec![3]));
    let some = allow("{exit_codes: [3, 137]}");
    assert!(some.covers(Some(137)) && !some.covers(Some(1)) && !some.covers(None));
    assert!(AllowFailure::Yes.covers(None) && !AllowFailure::No.covers(Some(1)));
    fails(
        "job: {script: x, allow_failure: {codes: 1}}",
        ".gitlab-ci.yml:1: job `job`: key `allow_failure`: must be true, false, or a mapping with exit_codes",
    );
    fails(
        "job: {script: x, allow_failure: {exit_codes: [a]}}",
        ".gitlab-ci.yml:1: job `job`: key `allow_failure:exit_codes`: is a text, must be a whole number",
    );
}

#[test]
fn timeouts_are_gitlabs_durations() {
    assert_eq!(one("job: {script: x, timeout: 1h 30m}").timeout, Some(Duration::from_secs(5400)));
    assert_eq!(one("job: {script: x, timeout: 90 minutes}").timeout, Some(Duration::from_secs(5400)));
    assert_eq!(one("job: {script: x, timeout: 60}").timeout, Some(Duration::from_secs(60)));
    fails(
        "job: {script: x, timeout: soon}",
        ".gitlab-ci.yml:1: job `job`: key `timeout`: `soon` is no duration; write it like `1h 30m` or `90 minutes`",
    );
    fails(
        "job: {script: x, timeout: 2 years}",
        ".gitlab-ci.yml:1: job `job`: key `timeout`: `2 years` must be between a second and a month",
    );
}

#[test]
fn keys_without_effect_are_noted_once_with_their_line() {
    let text = "
workflow: {rules: [{when: always}]}
default: {tags: [docker], image: alpine}
a:
  script: x
  cache: {paths: [c]}
  when: manual
  parallel: 4
  rules: [{if: $CI}]
b: {script: x, services: [redis], retry: 2, coverage: /x/, artifacts: {paths: [p], expose_as: it}}
";
    assert_eq!(
        notes(text, &["a", "b"]),
        [
            "2: key `workflow`: is ignored: a job that is named runs, and variables of its rules are not set",
            "3: key `tags`: is ignored: the machine class is chosen by options",
            "3: key `image`: `alpine` chooses the VM only if `--allow-image` names it; a shell runner in the VM ignores it",
            "6: job `a`: key `cache`: is ignored: each job starts without a cache",
            "7: job `a`: key `when`: `manual` is ignored: a job that is named runs",
            "8: job `a`: key `parallel`: 4 is ignored: the job runs once, with CI_NODE_TOTAL=1; one of them is `a 1/4`",
            "9: job `a`: key `rules`: is ignored: a job that is named runs, and variables of rules are not set",
            "10: job `b`: key `services`: run only where the image's runner has the docker executor",
            "10: job `b`: key `retry`: is ignored: a failed job is not run again",
            "10: job `b`: key `coverage`: is ignored: nobody reads a coverage figure here",
            "10: job `b`: key `expose_as`: is ignored: it is about GitLab's pages",
        ]
    );
    assert!(notes("job: {script: x, when: on_success}", &["job"]).is_empty());
}

#[test]
fn what_exec_cannot_do_is_an_error_with_key_and_line() {
    fails("include: a.yml\njob: {script: x}", ".gitlab-ci.yml:1: key `include`: `a.yml` is not in the repository");
    fails(
        "job:\n  trigger: a/b",
        ".gitlab-ci.yml:2: job `job`: key `trigger`: starts another pipeline, which only GitLab can; name a job with a script",
    );
    fails(
        "job:\n  run: [{name: a, script: x}]",
        ".gitlab-ci.yml:2: job `job`: key `run`: steps are not supported; write the job with `script`",
    );
    fails(
        "job:\n  script: x\n  parallel: {matrix: [{A: [1, 2]}]}",
        ".gitlab-ci.yml: `job` is 2 jobs; name one of them: `job: [1]`, `job: [2]`",
    );
    fails(
        "job:\n  script: x\n  scirpt: y",
        ".gitlab-ci.yml:3: job `job`: key `scirpt`: is no key of a job that exec knows; correct or remove it",
    );
    fails(
        "job:\n  script: x\n  <<: [a]",
        ".gitlab-ci.yml:3: job `job`: key `<<`: is no key of a job that exec knows; correct or remove it",
    );
    fails(
        "job:\n  script: x\n  image: !foo y",
        ".gitlab-ci.yml:3: job `job`: key `image`: is tagged !foo, a tag that GitLab does not know, must be a mapping",
    );
    fails(
        "job: {script: x, when: never}",
        ".gitlab-ci.yml:1: job `job`: key `when`: `never` stands in rules only; remove it",
    );
    fails(
        "job: {script: x, stage: deplyo}",
        ".gitlab-ci.yml:1: job `job`: key `stage`: there is no stage `deplyo`; stages: .pre, build, test, deploy, .post",
    );
}

#[test]
fn jobs_that_are_not_asked_for_are_not_read() {
    let text = "
job: {script: [!reference [.x, script]]}
.x: {script: [y]}
broken: {extends: .nothing, scirpt: 1, trigger: a, needs: [{project: p}]}
unreadable: [1, 2]
";
    assert_eq!(one(text).script, ["y"]);
}

#[test]
fn names_that_are_no_jobs_are_answered_with_those_that_are() {
    let text = "stages: [a]\n.hidden: {script: x}\none: {script: x, stage: a}\ntwo: {script: x}\n";
    let message = |name: &str| run(text, &[name]).unwrap_err().to_string();
    assert_eq!(message("tow"), ".gitlab-ci.yml: no job `tow`; its jobs: one, two");
    assert_eq!(message("stages"), ".gitlab-ci.yml: no job `stages`; its jobs: one, two");
    assert_eq!(
        message(".hidden"),
        ".gitlab-ci.yml: `.hidden` is a hidden job, a template for others; name a job without a leading dot"
    );
    assert_eq!(run("stages: [a]", &["x"]).unwrap_err().to_string(), ".gitlab-ci.yml: no job `x`; the file has none");
    let missing = read(Path::new("/nowhere/ci.yml"), &["x".into()], &Memory::default()).unwrap_err();
    assert_eq!(missing.to_string(), "read pipeline file `/nowhere/ci.yml`; name another one with --file");
}

#[test]
fn a_file_that_is_too_long_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ci.yml");
    let mut text = "job: {script: x}\n".to_owned();
    text.push_str(&"#".repeat(1024 * 1024 - text.len()));
    std::fs::write(&path, &text).unwrap();
    assert!(read(&path, &["job".into()], &Memory::default()).is_ok());
    text.push('#');
    std::fs::write(&path, &text).unwrap();
    assert!(
        matches!(read(&path, &["job".into()], &Memory::default()), Err(PipelineError::Read { source, .. }) if source.kind() == io::ErrorKind::FileTooLarge)
    );
}

fn links(text: &str, names: &[&str]) -> Vec<String> {
    let jobs = run(text, names).unwrap().jobs;
    jobs.iter()
        .map(|j| format!("{} after [{}] from [{}]", j.name, j.after.join(" "), j.artifacts_from.join(" ")))
        .collect()
}

#[test]
fn jobs_run_by_stage_and_needs_and_pass_artifacts_on() {
    let text = "
stages: [build, test, deploy]
deploy: {stage: deploy, script: x}
quick: {stage: deploy, script: x, needs: []}
picky: {stage: deploy, script: x, dependencies: [build]}
test: {stage: test, script: x, needs: [build, {job: lint, artifacts: false}, {job: gone, optional: true}]}
lint: {stage: test, script: x}
build: {stage: build, script: x}
";
    assert_eq!(
        links(text, &["test", "deploy", "build", "lint", "quick", "picky"]),
        [
            "build after [] from []",
            "lint after [build] from [build]",
            "test after [build lint] from [build]",
            "deploy after [test lint build] from [test lint build]",
            "quick after [] from []",
            "picky after [test lint build] from [build]",
        ]
    );
    assert_eq!(links(text, &["test"]), ["test after [] from []"]);
    assert_eq!(
        notes(text, &["test", "build"]),
        [
            "6: job `test`: key `needs`: `lint` does not run, so its artifacts are missing; to run it first: dayfly exec lint test"
        ]
    );
}

#[test]
fn links_that_lead_nowhere_are_errors() {
    fails(
        "job: {script: x, needs: [gone]}",
        ".gitlab-ci.yml:1: job `job`: key `needs`: there is no job `gone` in this file",
    );
    fails(
        "job: {script: x, dependencies: [gone]}",
        ".gitlab-ci.yml:1: job `job`: key `dependencies`: there is no job `gone` in this file",
    );
    fails("job: {script: x, needs: [job]}", ".gitlab-ci.yml:1: job `job`: key `needs`: names the job itself");
    let circle = run("a: {script: x, needs: [b]}\nb: {script: x, needs: [a]}", &["a", "b"]).unwrap_err();
    assert_eq!(circle.to_string(), ".gitlab-ci.yml:1: key `needs`: jobs wait for each other: a, b");
}
