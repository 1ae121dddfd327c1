//! A `.gitlab-ci.yml`: one plan or one message, soon.

use crate::exec::pipeline::{PipelineError, plan};
use std::path::Path;

/// The jobs `job` and `test` of a file: a plan of what was asked for, in an order that can be run, or one message that
/// points into the file.
pub fn pipeline(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    // YAML ends a line at a lone carriage return, too.
    let lines = text.bytes().filter(|byte| matches!(byte, b'\n' | b'\r')).count() + 1;
    let path = Path::new(".gitlab-ci.yml");
    for names in [["job"].as_slice(), &["job", "test"]] {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        match plan(path, text, &names) {
            Ok(plan) => {
                let mut planned: Vec<_> = plan.jobs.iter().map(|job| job.name.clone()).collect();
                for (at, job) in plan.jobs.iter().enumerate() {
                    assert!((1..=lines).contains(&job.line));
                    for before in job.after.iter().chain(&job.artifacts_from) {
                        assert!(
                            planned[..at].contains(before),
                            "`{}` waits for `{before}`, which comes later",
                            job.name
                        );
                    }
                    assert!(!job.script.is_empty());
                }
                assert!(plan.notes.iter().all(|note| (1..=lines).contains(&note.line)));
                planned.sort();
                assert_eq!(planned, names);
            }
            Err(PipelineError::Content { fault, .. }) => assert!((1..=lines).contains(&fault.line), "{fault}"),
            Err(PipelineError::NoSuchJob { name, known, .. }) => {
                assert!(names.contains(&name) && !known.contains(&name));
            }
            Err(error) => panic!("{error}"),
        }
    }
}
