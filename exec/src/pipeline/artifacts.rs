//! `artifacts`: what the runner uploads, and which reports there are.

use super::error::Fault;
use super::model::{Artifacts, When};
use super::node::{Entry, Node};

/// Types of reports (GitLab 18, CI/CD artifacts reports types); `coverage_report` is a mapping.
const REPORTS: &[&str] = &[
    "accessibility",
    "annotations",
    "api_fuzzing",
    "browser_performance",
    "cluster_image_scanning",
    "codequality",
    "container_scanning",
    "coverage_fuzzing",
    "cyclonedx",
    "dast",
    "dependency_scanning",
    "dotenv",
    "junit",
    "license_scanning",
    "load_performance",
    "lsif",
    "metrics",
    "performance",
    "repository_xray",
    "requirements",
    "requirements_v2",
    "sast",
    "secret_detection",
    "terraform",
];

/// Formats of `coverage_report`, which are the types under which they are uploaded.
const COVERAGE_FORMATS: &[&str] = &["cobertura", "jacoco"];

/// What `artifacts` asks for, and keys of it that have no effect here.
pub(super) fn read(node: &Node) -> Result<(Artifacts, Vec<Entry>), Fault> {
    let mut artifacts = Artifacts::default();
    let mut ignored = Vec::new();
    for entry in node.mapping()?.iter().filter(|e| !e.value.is_null()) {
        let value = &entry.value;
        let read = match entry.key.as_str() {
            "name" => value.text().map(|t| artifacts.name = t.to_owned()),
            "untracked" => value.boolean().map(|b| artifacts.untracked = b),
            "paths" => value.texts().map(|t| artifacts.paths = t),
            "exclude" => value.texts().map(|t| artifacts.exclude = t),
            "when" => when(value).map(|w| artifacts.when = w),
            "expire_in" => value.scalar().map(|t| artifacts.expire_in = Some(t.to_owned())),
            "reports" => reports(value).map(|r| artifacts.reports = r),
            "expose_as" | "public" | "access" => {
                ignored.push(entry.clone());
                Ok(())
            }
            _ => Err(Fault::at(entry.line, "is no key of `artifacts`; correct or remove it")),
        };
        read.map_err(|f| f.under(&entry.key))?;
    }
    Ok((artifacts, ignored))
}

fn when(value: &Node) -> Result<When, Fault> {
    match value.text()? {
        "on_success" => Ok(When::OnSuccess),
        "on_failure" => Ok(When::OnFailure),
        "always" => Ok(When::Always),
        other => Err(Fault::at(value.line, format!("is `{other}`, must be on_success, on_failure or always"))),
    }
}

fn reports(node: &Node) -> Result<Vec<(String, Vec<String>)>, Fault> {
    let mut reports = Vec::new();
    for entry in node.mapping()?.iter().filter(|e| !e.value.is_null()) {
        let report = match entry.key.as_str() {
            "coverage_report" => coverage(&entry.value),
            kind if REPORTS.contains(&kind) => entry.value.text_or_texts().map(|paths| (kind.to_owned(), paths)),
            _ => Err(Fault::at(entry.line, "is no report type that GitLab knows; correct or remove it")),
        };
        reports.push(report.map_err(|f| f.under(&entry.key))?);
    }
    Ok(reports)
}

fn coverage(node: &Node) -> Result<(String, Vec<String>), Fault> {
    let entries = node.mapping()?;
    if let Some(other) = entries.iter().find(|e| !matches!(e.key.as_str(), "coverage_format" | "path")) {
        return Err(
            Fault::at(other.line, "is no key of `coverage_report`; it has coverage_format and path").under(&other.key)
        );
    }
    let (Some(format), Some(path)) = (node.get("coverage_format"), node.get("path")) else {
        return Err(Fault::at(node.line, "must have coverage_format and path"));
    };
    let name = format.value.text()?;
    if !COVERAGE_FORMATS.contains(&name) {
        return Err(
            Fault::at(format.line, format!("is `{name}`, must be cobertura or jacoco")).under("coverage_format")
        );
    }
    Ok((name.to_owned(), vec![path.value.text()?.to_owned()]))
}
