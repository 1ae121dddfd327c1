//! Which jobs does a pipeline have, and which of them cannot run here?

use super::sources::Sources;
use super::{Pipeline, PipelineError, job_names, text};
use std::path::Path;

/// Jobs that are listed at most. The largest public pipelines have 1,500.
const JOBS_MAX: usize = 2000;

/// One job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// As it is to be asked for.
    pub name: String,
    /// Its stage; none if it cannot be read.
    pub stage: Option<String>,
    /// Why it cannot run here, as `exec` would say it.
    pub refused: Option<String>,
}

/// The jobs of the pipeline at `path`, in the order of stages and of the file, and how many more there are.
///
/// # Errors
/// [`PipelineError`]: the file itself.
pub fn list(path: &Path, sources: &dyn Sources) -> Result<(Vec<Listed>, usize), PipelineError> {
    list_text(path, &text(path)?, sources)
}

/// As [`list`], of a text.
pub(super) fn list_text(path: &Path, text: &str, sources: &dyn Sources) -> Result<(Vec<Listed>, usize), PipelineError> {
    let pipeline = Pipeline::load(path, text, sources)?;
    let keys = pipeline.resolver.root().mapping().map(job_names).unwrap_or_default();
    let mut jobs = Vec::new();
    let mut more = 0;
    for key in keys {
        if jobs.len() >= JOBS_MAX {
            more += 1;
            continue;
        }
        pipeline.resolver.refill();
        let several = pipeline.variants(&key).ok().flatten().unwrap_or_default();
        let names: Vec<String> = match several.iter().any(|variant| !variant.variables.is_empty()) {
            true => several.into_iter().map(|variant| variant.name).collect(),
            false => vec![key],
        };
        for name in names {
            pipeline.resolver.refill();
            jobs.push(match pipeline.plan(std::slice::from_ref(&name)) {
                Ok(plan) => Listed { name, stage: plan.jobs.into_iter().next().map(|job| job.stage), refused: None },
                Err(error) => Listed { name, stage: None, refused: Some(error.to_string()) },
            });
        }
    }
    let order = &pipeline.globals.stages;
    let rank = |job: &Listed| job.stage.as_ref().and_then(|stage| order.iter().position(|s| s == stage));
    // Those that cannot run have no stage and come last.
    jobs.sort_by_key(|job| (job.refused.is_some(), rank(job).unwrap_or(order.len())));
    Ok((jobs, more))
}
