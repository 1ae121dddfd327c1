//! `dayfly migrate FILE`: takes over what can be of a gitlab-runner's config.toml, and says line by line what became of it.
//!
//! The runners keep their tokens, so nothing is asked of GitLab. What is written is judged as a whole, as `register` has
//! it: tokens and copies of TLS files beside the configuration, entries behind those that are there. No value is shown:
//! the file is full of secrets.

mod fate;

use super::register::entry::{Change, Entry, NewFile, file_name, read_bounded, token_file, written_form};
use crate::files::plain;
use crate::gitlab::RunnerToken;
use crate::secret::Secret;
use crate::telemetry::printable;
use anyhow::{Context as _, bail};
use fate::{Fate, of_runner, of_top};
use std::collections::BTreeSet;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use toml_edit::{Document, DocumentMut, InlineTable, Item, Table, Value};
use url::Url;

/// A config.toml has some kilobytes.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Arguments of `migrate`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// gitlab-runner's config.toml
    #[arg(default_value = "/etc/gitlab-runner/config.toml")]
    file: PathBuf,
    /// Say what would become of it, and write nothing
    #[arg(long)]
    dry_run: bool,
}

/// What became of one line.
#[derive(Debug)]
struct Told {
    line: usize,
    /// As it stands there.
    key: String,
    words: String,
}

/// What a file comes to.
struct Plan {
    told: Vec<Told>,
    /// The configuration's new text.
    text: String,
    files: Vec<NewFile>,
    /// Entries that are taken over, of how many.
    taken: Vec<String>,
    entries: usize,
}

/// Runs the command.
pub(super) fn migrate(config: &Path, args: &Args) -> anyhow::Result<()> {
    let text = read(&args.file).with_context(|| format!("read `{}`", args.file.display()))?;
    let entry = Entry::open(config)?;
    let plan = plan(&text, &args.file, &entry)?;
    let target = entry.file().to_owned();
    let mut out = io::stdout();
    for told in &plan.told {
        writeln!(out, "line {}: {}: {}", told.line, printable(&told.key), printable(&told.words))?;
    }
    if plan.taken.is_empty() {
        bail!("take over a runner of `{}`: none of its {} can be", args.file.display(), plan.entries);
    }
    let changed = entry.edited(plan.text)?;
    let summary = format!("{} of {} runners ({})", plan.taken.len(), plan.entries, plan.taken.join(", "));
    if args.dry_run {
        writeln!(out, "would take over {} into {}; nothing was written", printable(&summary), target.display())?;
        return Ok(());
    }
    changed.write(&plan.files)?;
    writeln!(out, "took over {} into {}", printable(&summary), target.display())?;
    writeln!(
        out,
        "next: dayfly doctor; then stop gitlab-runner, or take these entries out of {}, and: systemctl enable --now dayfly",
        args.file.display()
    )?;
    Ok(())
}

fn read(file: &Path) -> io::Result<String> {
    let mut text = String::new();
    plain::open_chosen(file)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "too long for a config.toml"));
    }
    Ok(text)
}

/// Reads a config.toml for one configuration.
struct Reader<'a> {
    text: &'a str,
    /// Where the file is: its relative paths are relative to that.
    directory: &'a Path,
    entry: &'a Entry,
    told: Vec<Told>,
    files: Vec<NewFile>,
    /// Classes and entries, which go behind all that is there.
    behind: String,
    names: BTreeSet<String>,
    tokens: Vec<(Url, RunnerToken)>,
    /// Of each entry, from the top: `check_interval`.
    poll_interval: Option<String>,
}

/// What of one entry goes on.
#[derive(Default)]
struct Taken {
    keys: Vec<Change>,
    feature_flags: InlineTable,
    cpus: Option<i64>,
    memory_mib: Option<i64>,
}

fn plan(text: &str, file: &Path, entry: &Entry) -> anyhow::Result<Plan> {
    let document = Document::parse(text.to_owned())
        .map_err(|error| {
            anyhow::anyhow!(
                "line {}: {}",
                line_at(text, error.span().map_or(0, |span| span.start)),
                error.message().trim()
            )
        })
        .with_context(|| format!("parse `{}`", file.display()))?;
    let mut reader = Reader {
        text,
        directory: file.parent().unwrap_or(Path::new("/")),
        entry,
        told: Vec::new(),
        files: Vec::new(),
        behind: String::new(),
        names: entry.config().runner.iter().map(|runner| runner.name.clone()).collect(),
        tokens: Vec::new(),
        poll_interval: None,
    };
    let mut new: DocumentMut = entry.text().parse().context("parse the configuration")?;
    reader.top(document.as_table(), &mut new);
    let entries: Vec<&Table> =
        document.get("runners").and_then(Item::as_array_of_tables).into_iter().flatten().collect();
    let mut taken = Vec::new();
    for table in &entries {
        if let Some(name) = reader.runner(table) {
            taken.push(name);
        }
    }
    reader.told.sort_by_key(|told| told.line);
    // Behind the comments, too, which belong to no table.
    let mut text = new.to_string();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(&reader.behind);
    Ok(Plan { told: reader.told, text, files: reader.files, taken, entries: entries.len() })
}

fn line_at(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}

impl Reader<'_> {
    fn tell(&mut self, line: usize, key: &str, words: impl Into<String>) {
        self.told.push(Told { line, key: key.to_owned(), words: words.into() });
    }

    fn line_of(&self, table: &Table, key: &str) -> usize {
        let span = table.key(key).and_then(|key| key.span()).or_else(|| table.span());
        line_at(self.text, span.map_or(0, |span| span.start))
    }

    /// Keys above the entries.
    fn top(&mut self, table: &Table, new: &mut DocumentMut) {
        for (key, item) in table {
            let line = self.line_of(table, key);
            if key == "runners" {
                if item.as_array_of_tables().is_none() {
                    self.tell(line, key, "left out: it is no [[runners]]");
                }
                continue;
            }
            let words = match of_top(key, item) {
                Fate::Top(section, name, value) => set(new, section, name, value),
                Fate::PollInterval(seconds) => {
                    self.poll_interval = Some(seconds.clone());
                    format!("poll_interval = \"{seconds}\" of each runner")
                }
                Fate::Left(words) => format!("left out: {words}"),
                other => format!("left out: {other:?} stands in an entry"),
            };
            self.tell(line, key, words);
        }
    }

    /// One entry. Its name here, if it is taken over.
    fn runner(&mut self, table: &Table) -> Option<String> {
        let start = line_at(self.text, table.span().map_or(0, |span| span.start));
        let text = |key: &str| table.get(key).and_then(Item::as_str).map(str::trim).filter(|text| !text.is_empty());
        let url = match text("url").map(str::parse::<Url>) {
            Some(Ok(url)) if matches!(url.scheme(), "https" | "http") => url,
            _ => {
                self.tell(start, "[[runners]]", "the entry is left out: it has no address of a GitLab (`url`)");
                return None;
            }
        };
        let Some(token) = text("token") else {
            self.tell(
                start,
                "[[runners]]",
                "the entry is left out: it has no `token`; dayfly register takes a new one",
            );
            return None;
        };
        let token = RunnerToken::new(Secret::new(token));
        if self.tokens.iter().any(|(other, known)| *other == url && known.same_as(&token)) {
            self.tell(
                start,
                "[[runners]]",
                "the entry is left out: another has its very token, and one entry is enough",
            );
            return None;
        }
        let name = self.name(table, start)?;
        self.tokens.push((url.clone(), token.clone()));
        let mut taken = Taken::default();
        self.walk(table, "", &name, &mut taken);
        if url.scheme() == "http" {
            self.tell(
                self.line_of(table, "url"),
                "url",
                "it is http: allow_insecure_http = true, and tokens go in the clear as before",
            );
            taken.keys.push(("allow_insecure_http", true.into()));
        }
        self.own_ca(table, &url, &name, &mut taken);
        if let Some(seconds) = &self.poll_interval {
            taken.keys.push(("poll_interval", seconds.as_str().into()));
        }
        let Some(class) = self.class(&name, &taken) else {
            self.tell(start, "[[runners]]", "the entry is left out: the configuration has no [[class]] for its jobs");
            return None;
        };
        let mut keys: Vec<Change> = vec![
            ("name", name.as_str().into()),
            ("url", url.as_str().trim_end_matches('/').into()),
            ("token_file", token_file(&name).to_string_lossy().into_owned().into()),
            ("class", class.into()),
        ];
        keys.extend(taken.keys);
        if !taken.feature_flags.is_empty() {
            keys.push(("feature_flags", Value::InlineTable(taken.feature_flags)));
        }
        self.behind.push('\n');
        self.behind.push_str(&written_form("runner", keys));
        let path = self.entry.resolve(&token_file(&name));
        self.files.push(NewFile::token(path, &token));
        Some(name)
    }

    /// The entry's name, made one of its own if it must be.
    fn name(&mut self, table: &Table, start: usize) -> Option<String> {
        let wanted = table.get("name").and_then(Item::as_str).unwrap_or_default();
        let clean: String = wanted.chars().filter(|c| !c.is_control()).take(100).collect();
        let wanted = if clean.trim().is_empty() { "gitlab-runner".to_owned() } else { clean.trim().to_owned() };
        if self.entry.config().runner.iter().any(|runner| runner.name == wanted) {
            self.tell(start, "name", "the entry is left out: the configuration has a runner of this name already");
            return None;
        }
        let taken = |name: &str| self.names.iter().any(|other| file_name(other) == file_name(name));
        let mut name = wanted.clone();
        for n in 2.. {
            if !taken(&name) {
                break;
            }
            name = format!("{wanted}-{n}");
        }
        if name != wanted {
            self.tell(start, "name", format!("another entry's name is as this one's: it is `{name}` here"));
        }
        self.names.insert(name.clone());
        Some(name)
    }

    /// Each key of an entry, and of the tables in it.
    fn walk(&mut self, table: &Table, above: &str, name: &str, taken: &mut Taken) {
        for (key, item) in table {
            let path = if above.is_empty() { key.to_owned() } else { format!("{above}.{key}") };
            let line = self.line_of(table, key);
            if let (Item::Table(below), true) = (item, fate::is_walked(&path)) {
                self.walk(below, &path, name, taken);
                continue;
            }
            let words = match of_runner(&path, item) {
                Fate::Silent => continue,
                Fate::Key(key, value, words) => {
                    taken.keys.push((key, value));
                    words
                }
                Fate::Flag(flag, on) => {
                    taken.feature_flags.insert(flag, on.into());
                    "taken over".into()
                }
                Fate::Cpus(cpus) => {
                    taken.cpus = Some(cpus);
                    format!("cpus = {cpus} of a class of its own")
                }
                Fate::MemoryMib(mib) => {
                    taken.memory_mib = Some(mib);
                    format!("memory_mib = {mib} of a class of its own")
                }
                Fate::Tls(key, source) => self.tls(key, &source, name, taken),
                Fate::Left(words) => format!("left out: {words}"),
                other @ (Fate::Top(..) | Fate::PollInterval(_)) => format!("left out: {other:?} stands at the top"),
            };
            self.tell(line, &path, words);
        }
    }

    /// A TLS file gets a copy, which the daemon can read.
    fn tls(&mut self, key: &'static str, source: &str, name: &str, taken: &mut Taken) -> String {
        let source = self.directory.join(source);
        let suffix = match key {
            "tls_ca_file" => "ca.pem",
            "tls_cert_file" => "cert.pem",
            _ => "key.pem",
        };
        match read_bounded(&source) {
            Ok(bytes) => {
                let target = Path::new("tls").join(format!("{}.{suffix}", file_name(name)));
                self.files.push(NewFile::tls(self.entry.resolve(&target), bytes, key == "tls_key_file"));
                taken.keys.push((key, target.to_string_lossy().into_owned().into()));
                format!("{key}, a copy at {}", target.display())
            }
            Err(error) => format!("left out: {} cannot be read: {error}", source.display()),
        }
    }

    /// gitlab-runner takes `certs/HOST.crt` beside its file for GitLab's CA, without a key for it.
    fn own_ca(&mut self, table: &Table, url: &Url, name: &str, taken: &mut Taken) {
        let host = url.host_str().unwrap_or_default();
        let source = self.directory.join("certs").join(format!("{host}.crt"));
        if taken.keys.iter().all(|(key, _)| *key != "tls_ca_file") && source.is_file() {
            let words = self.tls("tls_ca_file", &source.to_string_lossy(), name, taken);
            let line = self.line_of(table, "url");
            self.tell(line, &format!("certs/{host}.crt"), words);
        }
    }

    /// The class of an entry's jobs: one of its own, if it says how large its jobs are, else the first.
    fn class(&mut self, name: &str, taken: &Taken) -> Option<String> {
        let first = self.entry.config().class.first()?;
        if taken.cpus.is_none() && taken.memory_mib.is_none() {
            return Some(first.name.clone());
        }
        let mut keys: Vec<Change> = vec![("name", name.into()), ("image", first.image.as_str().into())];
        keys.extend(taken.cpus.map(|cpus| ("cpus", cpus.into())));
        keys.extend(taken.memory_mib.map(|mib| ("memory_mib", mib.into())));
        self.behind.push('\n');
        self.behind.push_str(&written_form("class", keys));
        Some(name.to_owned())
    }
}

/// Sets a key of the configuration's, unless it is set. What became of it.
fn set(document: &mut DocumentMut, section: &str, name: &str, value: Value) -> String {
    let table = if section.is_empty() {
        Some(document.as_table_mut())
    } else {
        let table = document.entry(section).or_insert(Item::Table(Table::new()));
        table.as_table_mut()
    };
    let place = if section.is_empty() { name.to_owned() } else { format!("[{section}] {name}") };
    match table {
        Some(table) if table.contains_key(name) => format!("left out: {place} is set already, and stays"),
        Some(table) => {
            let shown = value.to_string();
            table.insert(name, Item::Value(value));
            format!("{place} = {}", shown.trim())
        }
        None => format!("left out: [{section}] is written in another way; set `{name}` there by hand"),
    }
}

#[cfg(test)]
mod tests;
