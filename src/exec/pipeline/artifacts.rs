//! `artifacts`: the archive and the reports, in the form in which GitLab passes them to a runner.
//!
//! Formats and file names of reports are GitLab's (`Ci::JobArtifact`, `app/models/concerns/ci/…`,
//! GitLab 18): `junit` and a few others travel as gzip, most as they are.

use super::error::Fault;
use super::model::{Artifact, When};
use super::node::{Entry, Node};

/// Report type, format, name of the uploaded file.
const REPORTS: &[(&str, &str, &str)] = &[
    ("accessibility", "raw", "gl-accessibility.json"),
    ("annotations", "gzip", "gl-annotations.json"),
    ("api_fuzzing", "raw", "gl-api-fuzzing-report.json"),
    ("browser_performance", "raw", "browser-performance.json"),
    ("cluster_image_scanning", "raw", "gl-cluster-image-scanning-report.json"),
    ("codequality", "raw", "gl-code-quality-report.json"),
    ("container_scanning", "raw", "gl-container-scanning-report.json"),
    ("coverage_fuzzing", "raw", "gl-coverage-fuzzing.json"),
    ("cyclonedx", "gzip", "gl-sbom.cdx.json"),
    ("dast", "raw", "gl-dast-report.json"),
    ("dependency_scanning", "raw", "gl-dependency-scanning-report.json"),
    ("dotenv", "gzip", ".env"),
    ("junit", "gzip", "junit.xml"),
    ("license_scanning", "raw", "gl-license-scanning-report.json"),
    ("load_performance", "raw", "load-performance.json"),
    ("lsif", "zip", "lsif.json"),
    ("metrics", "gzip", "metrics.txt"),
    ("performance", "raw", "performance.json"),
    ("repository_xray", "gzip", "gl-repository-xray.json"),
    ("requirements", "raw", "requirements.json"),
    ("requirements_v2", "raw", "requirements_v2.json"),
    ("sast", "raw", "gl-sast-report.json"),
    ("secret_detection", "raw", "gl-secret-detection-report.json"),
    ("terraform", "raw", "tfplan.json"),
];

/// Formats of `coverage_report`.
const COVERAGE_REPORTS: &[(&str, &str)] = &[("cobertura", "cobertura-coverage.xml"), ("jacoco", "jacoco-coverage.xml")];

/// What `artifacts` asks for, and keys of it that have no effect here.
pub(super) fn read(node: &Node) -> Result<(Vec<Artifact>, Vec<Entry>), Fault> {
    let mut archive = Artifact {
        kind: "archive".into(),
        format: "zip",
        name: String::new(),
        untracked: false,
        paths: Vec::new(),
        exclude: Vec::new(),
        when: When::OnSuccess,
        expire_in: None,
    };
    let mut reports = None;
    let mut ignored = Vec::new();
    for entry in node.mapping()?.iter().filter(|e| !e.value.is_null()) {
        let value = &entry.value;
        let read = match entry.key.as_str() {
            "name" => value.text().map(|t| archive.name = t.to_owned()),
            "untracked" => value.boolean().map(|b| archive.untracked = b),
            "paths" => value.texts().map(|t| archive.paths = t),
            "exclude" => value.texts().map(|t| archive.exclude = t),
            "when" => when(value).map(|w| archive.when = w),
            "expire_in" => value.scalar().map(|t| archive.expire_in = Some(t.to_owned())),
            "reports" => {
                reports = Some(entry);
                Ok(())
            }
            "expose_as" | "public" | "access" => {
                ignored.push(entry.clone());
                Ok(())
            }
            _ => Err(Fault::at(entry.line, "is no key of `artifacts`; correct or remove it")),
        };
        read.map_err(|f| f.under(&entry.key))?;
    }
    let expire_in = archive.expire_in.clone();
    let mut artifacts = Vec::new();
    if archive.untracked || !archive.paths.is_empty() {
        artifacts.push(archive);
    }
    if let Some(entry) = reports {
        artifacts.extend(read_reports(&entry.value, expire_in.as_deref()).map_err(|f| f.under("reports"))?);
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

fn read_reports(node: &Node, expire_in: Option<&str>) -> Result<Vec<Artifact>, Fault> {
    let mut reports = Vec::new();
    for entry in node.mapping()?.iter().filter(|e| !e.value.is_null()) {
        let report = |kind: &str, format, name: &str, paths| Artifact {
            kind: kind.to_owned(),
            format,
            name: name.to_owned(),
            untracked: false,
            paths,
            exclude: Vec::new(),
            // GitLab wants reports of failed jobs too, and gives its runners no choice.
            when: When::Always,
            expire_in: expire_in.map(str::to_owned),
        };
        let read = if entry.key == "coverage_report" {
            coverage(&entry.value).map(|(kind, name, path)| report(kind, "gzip", name, vec![path]))
        } else {
            match REPORTS.iter().find(|(kind, ..)| *kind == entry.key) {
                Some((kind, format, name)) => {
                    entry.value.text_or_texts().map(|paths| report(kind, format, name, paths))
                }
                None => Err(Fault::at(entry.line, "is no report type that GitLab knows; correct or remove it")),
            }
        };
        reports.push(read.map_err(|f| f.under(&entry.key))?);
    }
    Ok(reports)
}

fn coverage(node: &Node) -> Result<(&'static str, &'static str, String), Fault> {
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
    let Some((kind, file)) = COVERAGE_REPORTS.iter().find(|(kind, _)| *kind == name) else {
        return Err(
            Fault::at(format.line, format!("is `{name}`, must be cobertura or jacoco")).under("coverage_format")
        );
    };
    Ok((kind, file, path.value.text()?.to_owned()))
}
