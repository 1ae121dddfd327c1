//! A `.gitlab-ci.yml` and what it includes: one plan or one message, soon.

use dayfly_exec::pipeline::sources::Memory;
use dayfly_exec::pipeline::{Line, PipelineError, plan_with};
use std::path::Path;

/// What stands between the pipeline file and the one that it may include as `b.yml`.
const CUT: &str = "\n%%%\n";

/// The jobs `job` and `test` of a file: a plan of what was asked for, in an order that can be run, or one message that
/// points into one of its files. The file is there as `a.yml`, too, so it can include itself.
pub fn pipeline(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let (text, other) = text.split_once(CUT).unwrap_or((text, ""));
    let mut sources = Memory::default();
    for (path, text) in [("a.yml", text), ("b.yml", other), ("c/d.yml", "x: {script: [y]}")] {
        sources.files.insert(path.into(), text.into());
    }
    sources.variables.insert("A".into(), "b".into());
    // YAML ends a line at a lone carriage return, too.
    let lines_of = |text: &str| text.bytes().filter(|byte| matches!(byte, b'\n' | b'\r')).count() + 1;
    let lines = lines_of(text).max(lines_of(other));
    let points = |line: Line| (1..=lines).contains(&line.number);
    let path = Path::new(".gitlab-ci.yml");
    for names in [["job"].as_slice(), &["job", "test"], &["job: [a, b]", "test 1/2"]] {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        match plan_with(path, text, &names, &sources) {
            Ok(plan) => {
                let mut planned: Vec<_> = plan.jobs.iter().map(|job| job.name.clone()).collect();
                for (at, job) in plan.jobs.iter().enumerate() {
                    assert!(points(job.line) && job.line.file < plan.files.len());
                    for before in job.after.iter().chain(&job.artifacts_from) {
                        assert!(
                            planned[..at].contains(before),
                            "`{}` waits for `{before}`, which comes later",
                            job.name
                        );
                    }
                    assert!(!job.script.is_empty());
                }
                assert!(plan.notes.iter().all(|note| points(note.line) && note.line.file < plan.files.len()));
                planned.sort();
                assert_eq!(planned, names);
            }
            Err(PipelineError::Content { fault, .. }) => assert!(points(fault.line), "{fault}"),
            Err(PipelineError::NoSuchJob { name, known, .. }) => {
                assert!(names.contains(&name) && !known.contains(&name));
            }
            Err(PipelineError::Several { name, count, .. }) => assert!(names.contains(&name) && count > 0),
            Err(error) => panic!("{error}"),
        }
    }
}
