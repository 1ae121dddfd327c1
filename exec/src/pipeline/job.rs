//! One job's keys: those obeyed, those noted and ignored, and those that are errors.
//!
//! | key | here |
//! | --- | --- |
//! | `script`, `before_script`, `after_script`, `variables`, `stage`, `artifacts`, `needs`, `dependencies`, `timeout`, `allow_failure`, `extends`, `inherit`, `hooks` | obeyed |
//! | `image` | passed to the guest runner; the VM's image is the class's |
//! | `when`, `start_in`, `manual_confirmation`, `rules`, `only`, `except` | ignored: who names a job wants it to run now |
//! | `parallel` | one of its jobs runs, the one named (`test 1/4`, `test: [linux, 3.11]`); `test` alone runs `parallel: N` once |
//! | `id_tokens`, `identity`, `secrets` | ignored: only GitLab can issue them, the variables stay unset |
//! | `trigger`, `run`, `inputs`, unknown keys | errors |

use super::artifacts;
use super::containers::{image, services};
use super::duration;
use super::error::{Fault, Line};
use super::matrix::{self, Variant};
use super::model::{AllowFailure, Artifacts, Job, Note, Variable};
use super::node::{Entry, Kind, Node, Pairs};
use std::rc::Rc;

/// Keys that `default` may set for all jobs, as in GitLab.
const DEFAULT_KEYS: &[&str] = &[
    "after_script",
    "artifacts",
    "before_script",
    "cache",
    "hooks",
    "id_tokens",
    "identity",
    "image",
    "interruptible",
    "retry",
    "services",
    "tags",
    "timeout",
];

/// Keys of `default` that may also stand at the top of the file (GitLab's old way).
pub(super) const TOP_LEVEL_DEFAULTS: &[&str] = &["after_script", "before_script", "cache", "image", "services"];

/// Keys without effect here, and what that means.
const IGNORED: &[(&str, &str)] = &[
    ("cache", "is ignored: each job starts without a cache"),
    ("coverage", "is ignored: nobody reads a coverage figure here"),
    ("dast_configuration", "is ignored"),
    ("environment", "is ignored: nothing is deployed by GitLab, and CI_ENVIRONMENT_* are not set"),
    ("except", "is ignored: a job that is named runs"),
    ("id_tokens", "is ignored: only GitLab can issue tokens; the variables are not set"),
    ("identity", "is ignored: only GitLab can issue tokens"),
    ("interruptible", "is ignored"),
    ("manual_confirmation", "is ignored: a job that is named runs"),
    ("only", "is ignored: a job that is named runs"),
    ("pages", "is ignored: nothing is published"),
    ("publish", "is ignored: nothing is published"),
    ("release", "is ignored: no release is made"),
    ("resource_group", "is ignored: no other pipeline runs"),
    ("retry", "is ignored: a failed job is not run again"),
    ("rules", "is ignored: a job that is named runs, and variables of rules are not set"),
    ("secrets", "is ignored: no secrets server is asked; the variables are not set"),
    ("start_in", "is ignored: a job that is named runs"),
    ("tags", "is ignored: the machine class is chosen by options"),
];

/// Lists inside lists of a script, as in GitLab.
const SCRIPT_DEPTH_MAX: usize = 10;

/// What a job is read with.
pub(super) struct Context<'a> {
    /// `default` and the old global keys, resolved.
    pub(super) default: &'a [Entry],
    /// Global `variables`, resolved.
    pub(super) variables: Option<&'a Entry>,
    /// All stages, in order.
    pub(super) stages: &'a [String],
    /// What is added where something is missing that an include which is not read may have.
    pub(super) hint: &'a str,
}

/// `needs` and `dependencies`, before it is known which of those jobs run here.
#[derive(Debug, Default)]
pub(super) struct Links {
    /// `needs`: job, whether its artifacts are wanted, whether it may be missing; with the line.
    pub(super) needs: Option<Vec<Need>>,
    /// `dependencies`, with the line.
    pub(super) dependencies: Option<(Line, Vec<String>)>,
}

#[derive(Debug)]
pub(super) struct Need {
    pub(super) line: Line,
    pub(super) job: String,
    /// Which jobs of that key, if not all.
    pub(super) of_matrix: Option<Vec<String>>,
    pub(super) artifacts: bool,
    pub(super) optional: bool,
}

/// A job, what links it to others, and remarks.
pub(super) struct Read {
    pub(super) job: Job,
    pub(super) links: Links,
    pub(super) notes: Vec<Note>,
}

/// Reads a resolved job; of several of its key, `variant`.
pub(super) fn read(entry: &Entry, variant: Option<&Variant>, context: &Context<'_>) -> Result<Read, Fault> {
    let node = &entry.value;
    node.mapping()
        .map_err(|_| Fault::at(entry.line, format!("is {}, must be a mapping with at least `script`", node.noun())))?;
    let keys = effective(node, context)?;
    let mut notes = Notes { job: &entry.key, list: Vec::new() };
    let mut links = Links::default();
    let mut script = None;
    let mut before_script = Vec::new();
    let mut job = Job {
        name: variant.map_or_else(|| entry.key.clone(), |v| v.name.clone()),
        line: entry.line,
        key: entry.key.clone(),
        node: variant.map(|v| (v.index, v.total)),
        stage: "test".into(),
        script: Vec::new(),
        after_script: Vec::new(),
        variables: Vec::new(),
        image: None,
        services: Vec::new(),
        artifacts: Artifacts::default(),
        timeout: None,
        allow_failure: AllowFailure::No,
        pre_get_sources_script: Vec::new(),
        after: Vec::new(),
        artifacts_from: Vec::new(),
    };
    // A key that exec cannot do is the news, whatever else is missing or wrong.
    if let Some(fault) = keys.iter().find_map(|(e, _)| impossible(e)) {
        return Err(fault);
    }
    let needed = keys.iter().filter(|(e, _)| IGNORED.iter().all(|(name, _)| *name != e.key));
    if let Some(fault) = needed.clone().find_map(|(e, _)| e.value.broken().map(|f| f.under(&e.key))) {
        return Err(fault);
    }
    for (entry, own) in &keys {
        let value = &entry.value;
        let read = match entry.key.as_str() {
            "script" => lines(value).map(|l| script = Some(l)),
            "before_script" => lines(value).map(|l| before_script = l),
            "after_script" => lines(value).map(|l| job.after_script = l),
            "stage" => value.text().map(|t| job.stage = t.to_owned()),
            "image" => image(value).map(|i| {
                notes.add(
                    entry,
                    *own,
                    format!(
                        "`{}` chooses the VM only if `--allow-image` names it; a shell runner in the VM ignores it",
                        i.name
                    ),
                );
                job.image = Some(i);
            }),
            "services" => services(value).map(|services| {
                notes.add(entry, *own, "run only where the image's runner has the docker executor".into());
                job.services = services;
            }),
            "artifacts" => artifacts::read(value).map(|(artifacts, ignored)| {
                ignored.iter().for_each(|e| notes.add(e, *own, "is ignored: it is about GitLab's pages".into()));
                job.artifacts = artifacts;
            }),
            "timeout" => timeout(value).map(|t| job.timeout = Some(t)),
            "allow_failure" => allow_failure(value).map(|a| job.allow_failure = a),
            "hooks" => hooks(value).map(|h| job.pre_get_sources_script = h),
            "needs" => needs(value, *own, &mut notes).map(|n| links.needs = Some(n)),
            "dependencies" => value.texts().map(|t| links.dependencies = Some((entry.line, t))),
            "when" => when(value).map(|w| {
                if w != "on_success" {
                    notes.add(entry, *own, format!("`{w}` is ignored: a job that is named runs"));
                }
            }),
            "parallel" if variant.is_none() => matrix::variants(&job.key, value).map(|variants| {
                if let Some(first) = variants.iter().flatten().next() {
                    let what = format!(
                        "{} is ignored: the job runs once, with CI_NODE_TOTAL=1; one of them is `{}`",
                        first.total, first.name
                    );
                    notes.add(entry, *own, what);
                }
            }),
            // Read elsewhere: resolve, variables below, effective.
            "extends" | "variables" | "inherit" | "parallel" => Ok(()),
            key => {
                if let Some((_, what)) = IGNORED.iter().find(|(name, _)| *name == key) {
                    notes.add(entry, *own, (*what).to_owned());
                }
                Ok(())
            }
        };
        read.map_err(|f| f.under(&entry.key))?;
    }
    job.variables = variables(node, context, &mut notes)?;
    for variable in variant.iter().flat_map(|v| &v.variables) {
        job.variables.retain(|v| v.key != variable.key);
        job.variables.push(variable.clone());
    }
    match script {
        Some(script) if !script.is_empty() => job.script = before_script.into_iter().chain(script).collect(),
        _ => {
            let what = format!("is missing; a job must say what to run{}", context.hint);
            return Err(Fault::at(entry.line, what).under("script"));
        }
    }
    if !context.stages.contains(&job.stage) {
        let line = node.get("stage").map_or(entry.line, |e| e.line);
        let what = format!("there is no stage `{}`; stages: {}", job.stage, context.stages.join(", "));
        if context.hint.is_empty() {
            return Err(Fault::at(line, what).under("stage"));
        }
        // `stages` may stand in what is not read, and a job that is named needs none.
        let what = format!("{what}{}", context.hint);
        notes.list.push(Note { line, job: Some(notes.job.to_owned()), key: "stage".into(), what });
    }
    Ok(Read { job, links, notes: notes.list })
}

struct Notes<'a> {
    job: &'a str,
    list: Vec<Note>,
}

impl Notes<'_> {
    /// `own`: the key stands in the job, not in `default`.
    fn add(&mut self, entry: &Entry, own: bool, what: String) {
        self.list.push(Note { line: entry.line, job: own.then(|| self.job.to_owned()), key: entry.key.clone(), what });
    }
}

/// The job's keys, and those of `default` that it does not set itself; each with whether it is
/// the job's own. Null means "not set", and in a job also "do not inherit".
fn effective<'a>(node: &'a Node, context: &Context<'a>) -> Result<Vec<(&'a Entry, bool)>, Fault> {
    let inherits = inherit(node, "default")?;
    let own = node.mapping()?;
    let inherited = context
        .default
        .iter()
        .filter(|e| DEFAULT_KEYS.contains(&e.key.as_str()) && inherits.allows(&e.key) && node.entry(&e.key).is_none());
    Ok(own.iter().map(|e| (e, true)).chain(inherited.map(|e| (e, false))).filter(|(e, _)| !e.value.is_null()).collect())
}

/// What `inherit:default` or `inherit:variables` lets through.
enum Inherit {
    All,
    Nothing,
    These(Vec<String>),
}

impl Inherit {
    fn allows(&self, key: &str) -> bool {
        match self {
            Self::All => true,
            Self::Nothing => false,
            Self::These(keys) => keys.iter().any(|k| k == key),
        }
    }
}

fn inherit(node: &Node, what: &str) -> Result<Inherit, Fault> {
    let Some(inherit) = node.get("inherit") else { return Ok(Inherit::All) };
    let under = |f: Fault| f.under("inherit");
    if let Some(other) =
        inherit.value.mapping().map_err(under)?.iter().find(|e| !matches!(e.key.as_str(), "default" | "variables"))
    {
        return Err(Fault::at(other.line, "is no key of `inherit`; it has default and variables")
            .under(&other.key)
            .under("inherit"));
    }
    let Some(entry) = inherit.value.get(what) else { return Ok(Inherit::All) };
    match entry.value.kind() {
        Some(Kind::Boolean(true)) => Ok(Inherit::All),
        Some(Kind::Boolean(false)) => Ok(Inherit::Nothing),
        _ => entry.value.texts().map(Inherit::These).map_err(|f| f.under(what).under("inherit")),
    }
}

/// The error for keys that exec cannot do.
fn impossible(entry: &Entry) -> Option<Fault> {
    const OBEYED: &[&str] = &[
        "script",
        "before_script",
        "after_script",
        "stage",
        "image",
        "services",
        "artifacts",
        "timeout",
        "allow_failure",
        "hooks",
        "needs",
        "dependencies",
        "when",
        "parallel",
        "extends",
        "variables",
        "inherit",
    ];
    let what = match entry.key.as_str() {
        "trigger" => "starts another pipeline, which only GitLab can; name a job with a script",
        "run" => "steps are not supported; write the job with `script`",
        "inputs" => "are filled in by GitLab only; write the values into the job",
        key if OBEYED.contains(&key) || IGNORED.iter().any(|(name, _)| *name == key) => return None,
        _ => "is no key of a job that exec knows; correct or remove it",
    };
    Some(Fault::at(entry.line, what).under(&entry.key))
}

/// A script: a text, or texts in lists in lists.
fn lines(node: &Node) -> Result<Vec<String>, Fault> {
    fn collect(node: &Rc<Node>, depth: usize, lines: &mut Vec<String>) -> Result<(), Fault> {
        match node.sequence() {
            Ok(_) if depth >= SCRIPT_DEPTH_MAX => {
                Err(Fault::at(node.line, format!("has lists nested deeper than {SCRIPT_DEPTH_MAX} levels")))
            }
            Ok(items) => items.iter().try_for_each(|item| collect(item, depth + 1, lines)),
            Err(_) if node.mapping().is_ok() => {
                Err(Fault::at(node.line, "a command is a mapping; put commands with `: ` in quotes"))
            }
            Err(_) => node.text().map(|t| lines.push(t.to_owned())),
        }
    }
    let mut lines = Vec::new();
    collect(&Rc::new(node.clone()), 0, &mut lines)?;
    Ok(lines)
}

fn timeout(node: &Node) -> Result<std::time::Duration, Fault> {
    let text = node.scalar()?;
    match duration::parse(text) {
        Some(timeout) if timeout <= duration::TIMEOUT_MAX && timeout.as_secs() > 0 => Ok(timeout),
        Some(_) => Err(Fault::at(node.line, format!("`{text}` must be between a second and a month"))),
        None => Err(Fault::at(node.line, format!("`{text}` is no duration; write it like `1h 30m` or `90 minutes`"))),
    }
}

fn allow_failure(node: &Node) -> Result<AllowFailure, Fault> {
    if let Some(Kind::Boolean(allowed)) = node.kind() {
        return Ok(if allowed { AllowFailure::Yes } else { AllowFailure::No });
    }
    let wrong = || Fault::at(node.line, "must be true, false, or a mapping with exit_codes");
    let entries = node.mapping().map_err(|_| wrong())?;
    let [codes] = entries else { return Err(wrong()) };
    if codes.key != "exit_codes" {
        return Err(wrong());
    }
    let code = |n: &Node| i32::try_from(n.integer()?).map_err(|_| Fault::at(n.line, "is no exit code"));
    let codes = match codes.value.sequence() {
        Ok(items) => items.iter().map(|n| code(n)).collect::<Result<_, _>>(),
        Err(_) => code(&codes.value).map(|c| vec![c]),
    };
    codes.map(AllowFailure::ExitCodes).map_err(|f| f.under("exit_codes"))
}

fn hooks(node: &Node) -> Result<Vec<String>, Fault> {
    let mut script = Vec::new();
    for entry in node.mapping()? {
        match entry.key.as_str() {
            "pre_get_sources_script" => script = lines(&entry.value).map_err(|f| f.under(&entry.key))?,
            _ => return Err(Fault::at(entry.line, "is no hook; there is pre_get_sources_script").under(&entry.key)),
        }
    }
    Ok(script)
}

fn when(node: &Node) -> Result<String, Fault> {
    match node.text()? {
        known @ ("on_success" | "on_failure" | "always" | "manual" | "delayed") => Ok(known.to_owned()),
        "never" => Err(Fault::at(node.line, "`never` stands in rules only; remove it")),
        other => Err(Fault::at(
            node.line,
            format!("is `{other}`, must be on_success, on_failure, always, manual or delayed"),
        )),
    }
}

fn needs(node: &Node, own: bool, notes: &mut Notes<'_>) -> Result<Vec<Need>, Fault> {
    let mut needs = Vec::new();
    for item in flat(node)? {
        if let Ok(job) = item.text() {
            needs.push(Need {
                line: item.line,
                job: job.to_owned(),
                of_matrix: None,
                artifacts: true,
                optional: false,
            });
            continue;
        }
        let entries = item.mapping()?;
        if let Some(other) = entries.iter().find(|e| matches!(e.key.as_str(), "project" | "pipeline")) {
            let name = other.value.scalar().map_err(|f| f.under(&other.key))?;
            let what = format!("`{name}` has artifacts that only GitLab has: they are missing");
            notes.add(&Entry { key: format!("needs:{}", other.key), ..other.clone() }, own, what);
            continue;
        }
        for entry in entries {
            let what = match entry.key.as_str() {
                "job" | "artifacts" | "optional" | "parallel" => continue,
                _ => "is no key of `needs`; correct or remove it",
            };
            return Err(Fault::at(entry.line, what).under(&entry.key));
        }
        let Some(job) = item.get("job") else { return Err(Fault::at(item.line, "has an entry without `job`")) };
        let flag =
            |key: &str, otherwise| item.get(key).map_or(Ok(otherwise), |e| e.value.boolean().map_err(|f| f.under(key)));
        let name = job.value.text().map_err(|f| f.under("job"))?;
        let of_matrix = item.get("parallel").map(|e| matrix::names(name, &e.value).map_err(|f| f.under("parallel")));
        needs.push(Need {
            line: job.line,
            job: name.to_owned(),
            of_matrix: of_matrix.transpose()?,
            artifacts: flag("artifacts", true)?,
            optional: flag("optional", false)?,
        });
    }
    Ok(needs)
}

/// The items of a list; those of lists in it, which references leave, too.
fn flat(node: &Node) -> Result<Vec<&Node>, Fault> {
    let mut items = Vec::new();
    for item in node.sequence()? {
        match item.sequence() {
            Ok(inner) => items.extend(inner.iter().map(|n| &**n)),
            Err(_) => items.push(&**item),
        }
    }
    Ok(items)
}

/// Global variables that the job inherits, then its own.
fn variables(node: &Node, context: &Context<'_>, notes: &mut Notes<'_>) -> Result<Vec<Variable>, Fault> {
    let inherits = inherit(node, "variables")?;
    let mut pairs = Pairs::default();
    if let Some(global) = context.variables {
        for entry in global.value.mapping().map_err(|f| f.under("variables"))? {
            if inherits.allows(&entry.key) {
                pairs.put(entry.clone());
            }
        }
    }
    let globals = context.variables.and_then(|g| g.value.mapping().ok()).unwrap_or_default();
    if let Some(own) = node.get("variables") {
        own.value.mapping().map_err(|f| f.under("variables"))?.iter().for_each(|e| pairs.put(e.clone()));
    }
    let read = |entry: &Entry| variable(entry, globals.contains(entry), notes).map_err(|f| f.under("variables"));
    pairs.into_entries().iter().map(read).collect()
}

fn variable(entry: &Entry, global: bool, notes: &mut Notes<'_>) -> Result<Variable, Fault> {
    let under = |f: Fault| f.under(&entry.key);
    let (node, raw) = match entry.value.mapping() {
        Err(_) => (Some(&entry.value), false),
        Ok(entries) => {
            for inner in entries {
                if !matches!(inner.key.as_str(), "value" | "description" | "options" | "expand") {
                    return Err(under(
                        Fault::at(inner.line, "is no key of a variable; it has value, description, options and expand")
                            .under(&inner.key),
                    ));
                }
            }
            let expand = entry
                .value
                .get("expand")
                .map_or(Ok(true), |e| e.value.boolean().map_err(|f| under(f.under("expand"))))?;
            (entry.value.entry("value").map(|e| &e.value), !expand)
        }
    };
    let text = node.map_or(Ok(""), |n| n.scalar()).map_err(under)?;
    let value = match node.and_then(|n| n.kind()) {
        Some(Kind::Null) => String::new(),
        Some(Kind::Integer(number)) => {
            let value = number.to_string();
            if value != text {
                notes.add(
                    &Entry { key: format!("variables:{}", entry.key), ..entry.clone() },
                    !global,
                    format!("{text} is the number {value}, as in GitLab; put it in quotes if it is a text"),
                );
            }
            value
        }
        Some(Kind::Boolean(_) | Kind::Float) => {
            notes.add(
                &Entry { key: format!("variables:{}", entry.key), ..entry.clone() },
                !global,
                format!("GitLab refuses {text} without quotes; put it in quotes"),
            );
            text.to_owned()
        }
        _ => text.to_owned(),
    };
    if entry.key.is_empty() || !entry.key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(under(Fault::at(entry.line, "is no name of a variable; use letters, digits and _")));
    }
    Ok(Variable { key: entry.key.clone(), value, raw })
}
