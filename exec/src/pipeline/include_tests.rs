//! Pipelines of several files, inputs and matrices: what they come to, and where growing ends.

use super::sources::Memory;
use super::*;

fn sources(files: &[(&str, &str)]) -> Memory {
    let files = files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect();
    Memory { files, variables: [("BRANCH".to_owned(), "topic".to_owned())].into() }
}

fn run(text: &str, files: &[(&str, &str)], names: &[&str]) -> Result<Plan, PipelineError> {
    let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
    plan_with(Path::new(".gitlab-ci.yml"), text, &names, &sources(files))
}

fn fails(text: &str, files: &[(&str, &str)], expected: &str) {
    let shown = run(text, files, &["job"]).map_or_else(|e| e.to_string(), |plan| format!("{plan:?}"));
    assert_eq!(shown, expected, "{text}");
}

/// U33: a local file is read where it is named, comes first, and faults in it name it
#[test]
fn what_is_included_comes_first_and_is_overwritten() {
    let files = [
        ("a.yml", "variables: {A: a, B: a}\n.base: {script: [a], variables: {V: a, W: a}}\n"),
        ("b.yml", "include: a.yml\nvariables: {B: b}\n.base: {variables: {W: b}}\nbroken:\n  script: 1\n"),
    ];
    for include in [
        "b.yml",
        "[b.yml]",
        "{local: /b.yml}",
        "[[{local: b.yml}]]",
        "['*.yml']",
        "[a.yml, {local: $BRANCH.yml, rules: []}, b.yml]",
    ] {
        let text = format!("include: {include}\nvariables: {{C: c}}\njob: {{extends: .base, variables: {{X: c}}}}\n");
        let plan = run(&text, &files, &["job"]).unwrap();
        let job = &plan.jobs[0];
        assert_eq!(job.script, ["a"], "{include}");
        let variables: String = job.variables.iter().map(|v| format!("{}={} ", v.key, v.value)).collect();
        assert_eq!(variables, "A=a B=b C=c V=a W=b X=c ", "{include}");
        assert_eq!(job.line, Line { file: 0, number: 3 });
    }
    let error = run("include: b.yml\n", &files, &["broken"]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "b.yml:5: job `broken`: key `script`: is the number 1, must be a text; put it in quotes"
    );
    fails(
        "include: c.yml",
        &[("c.yml", "a: [")],
        "c.yml:1: is no YAML (column 1): while parsing a node, did not find expected node content",
    );
}

/// U33: a job that needs nothing of what is not read runs, and one that is only there is named with it
#[test]
fn what_is_not_read_is_an_error_only_where_it_is_needed() {
    let text = "include: {template: Security/SAST.gitlab-ci.yml}\njob: {script: x}\n";
    let plan = run(text, &[], &["job"]).unwrap();
    assert_eq!(plan.notes.len(), 1, "{:?}", plan.notes);
    assert_eq!(
        run(text, &[], &["sast"]).unwrap_err().to_string(),
        ".gitlab-ci.yml: no job `sast`; its jobs: job; it may stand in template `Security/SAST.gitlab-ci.yml` (line 1), which exec does not read"
    );
}

/// U33: files are bounded in number, depth and size, whatever they include
#[test]
fn including_has_an_end() {
    let names: Vec<String> = (0..152).map(|n| format!("f{n}.yml")).collect();
    let many: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "x: {script: [y]}")).collect();
    let list = |count: usize| format!("include: [{}]\njob: {{script: [x]}}\n", names[..count].join(", "));
    assert!(run(&list(150), &many, &["job"]).is_ok());
    fails(
        &list(151),
        &many,
        ".gitlab-ci.yml:1: key `include`: `f150.yml` is one file more than the 150 that may be included",
    );
    let chain: Vec<String> = (0..60).map(|n| format!("include: f{}.yml", n + 1)).collect();
    let deep: Vec<(&str, &str)> = names.iter().map(String::as_str).zip(chain.iter().map(String::as_str)).collect();
    fails(
        "include: f0.yml\njob: {script: [x]}",
        &deep,
        "f49.yml:1: key `include`: `f50.yml` is included through more than 50 files",
    );
    fails(
        "include: [a.yml]\njob: {script: [x]}",
        &[("a.yml", "include: b.yml"), ("b.yml", "include: a.yml")],
        "b.yml:1: key `include`: `a.yml` includes itself: a.yml includes b.yml includes a.yml",
    );
    let long = format!("x: y # {}\n", "z".repeat(1 << 20));
    let large: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), long.as_str())).collect();
    fails(&list(20), &large, ".gitlab-ci.yml:1: key `include`: more than 16 MiB of text");
    let keys: String = (0..20_000).map(|n| format!("k{n}: v\n")).collect();
    let wide: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), keys.as_str())).collect();
    let error = run(&list(100), &wide, &["job"]).unwrap_err().to_string();
    assert!(error.ends_with("more than 1000000 values in all included files together"), "{error}");
}

/// U34: inputs are filled in within bounds: text, values and levels
#[test]
fn filling_in_has_an_end() {
    let header = |input: &str| format!("spec: {{inputs: {{a: {input}}}}}\n---\n");
    let text = format!(
        "{}job: {{script: [{}]}}\n",
        header(&format!("{{default: {}}}", "x".repeat(100_000))),
        vec!["'$[[ inputs.a ]]'"; 100].join(", ")
    );
    fails(&text, &[], ".gitlab-ci.yml:3: key `job:script`: more than 8 MiB of text, with inputs filled in");
    let list = format!("{{type: array, default: [{}]}}", vec!["x"; 1000].join(", "));
    let text = format!("{}job: {{script: [{}]}}\n", header(&list), vec!["'$[[ inputs.a ]]'"; 101].join(", "));
    fails(&text, &[], ".gitlab-ci.yml:3: key `job:script`: more than 100000 values, with inputs filled in");
    let deep = format!("{{type: array, default: {}x{}}}", "[".repeat(90), "]".repeat(90));
    let text = format!("{}job: {{script: [[[[[[[[[[['$[[ inputs.a ]]']]]]]]]]]]]}}\n", header(&deep));
    fails(&text, &[], ".gitlab-ci.yml:3: more than 100000 values or 100 levels, with inputs filled in");
}

/// U34: one job of a matrix is asked for by its name, alone or with others, and links find it
#[test]
fn jobs_of_a_matrix_are_asked_for_by_name() {
    let text = "
stages: [build, test]
build: {stage: build, script: [x], parallel: {matrix: [{A: [1, 2], B: [x y, '']}, {A: [3.10]}]}}
one: {stage: test, script: [x], needs: [{job: build, parallel: {matrix: [{A: 2, B: x y}]}}]}
all: {stage: test, script: [x], needs: [build]}
deps: {stage: test, script: [x], dependencies: ['build: [3.1]']}
count: {stage: test, parallel: 2, script: [x]}
";
    let links = |names: &[&str]| -> Vec<String> {
        let jobs = run(text, &[], names).unwrap().jobs;
        jobs.iter().map(|j| format!("{} {:?} from [{}]", j.name, j.node, j.artifacts_from.join(" "))).collect()
    };
    assert_eq!(
        links(&["one", "all", "build: [2, x y]", "build: [3.1]", "deps"]),
        [
            "build: [2, x y] Some((3, 5)) from []",
            "build: [3.1] Some((5, 5)) from []",
            "one None from [build: [2, x y]]",
            "all None from [build: [2, x y] build: [3.1]]",
            "deps None from [build: [3.1]]",
        ]
    );
    assert_eq!(links(&["count 2/2", "count 1/2", "count 2/2"]).len(), 2, "each once");
    assert_eq!(links(&["count"]), ["count None from []"]);
    assert_eq!(
        run(text, &[], &["build"]).unwrap_err().to_string(),
        ".gitlab-ci.yml: `build` is 5 jobs; name one of them: `build: [1, x y]`, `build: [1, ]`, `build: [2, x y]`, `build: [2, ]`, `build: [3.1]`"
    );
    for gone in ["build: [4]", "count 3/2", "count 1/3", "build: [1, x y] "] {
        assert!(matches!(run(text, &[], &[gone]), Err(PipelineError::NoSuchJob { .. })), "{gone}");
    }
}

/// U34: the list names every job with its stage, and why one cannot run
#[test]
fn all_jobs_are_listed_with_what_is_in_their_way() {
    let text = "
stages: [build, test]
later: {stage: test, script: [x]}
.hidden: {script: [x]}
down: {trigger: a/b}
many: {stage: build, parallel: {matrix: [{A: [1, 2]}]}, script: [x]}
";
    let (jobs, more) = list::list_text(Path::new("ci.yml"), text, &Memory::default()).unwrap();
    let shown: Vec<String> = jobs
        .iter()
        .map(|j| format!("{} {} {}", j.stage.as_deref().unwrap_or("-"), j.name, j.refused.as_deref().unwrap_or("runs")))
        .collect();
    assert_eq!(
        shown,
        [
            "build many: [1] runs",
            "build many: [2] runs",
            "test later runs",
            "- down ci.yml:5: job `down`: key `trigger`: starts another pipeline, which only GitLab can; name a job with a script",
        ]
    );
    assert_eq!(more, 0);
    let keys: String = (0..2500).map(|n| format!("j{n}: {{script: [x]}}\n")).collect();
    let (jobs, more) = list::list_text(Path::new("ci.yml"), &keys, &Memory::default()).unwrap();
    assert_eq!((jobs.len(), more), (2000, 500));
}
