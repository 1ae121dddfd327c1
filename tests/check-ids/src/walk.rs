//! The tests that rings run, found as the compiler finds them: from the crate roots along `mod`.
//!
//! What the compiler does not see, is not there: comments, files that no `mod` names, modules that
//! a `#[cfg]` turns off, `#[ignore]`d tests, functions inside functions, tests without a body. A claim
//! there, or on anything that is no test, is an error.

use crate::Wrongs;
use crate::cfg;
use crate::claim::{self, Id};
use crate::rings;
use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A test's doc line names an id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claim {
    pub(crate) id: Id,
    pub(crate) file: String,
    pub(crate) line: usize,
}

/// All claims of tests that a ring runs. What is wrong with others goes to `wrong`.
pub(crate) fn of_rings(root: &Path, wrong: &mut Wrongs) -> BTreeSet<Claim> {
    let mut walk = Walk { root, seen: BTreeSet::new(), claims: BTreeSet::new(), wrong: Wrongs::new() };
    for file in rings::roots(root, wrong) {
        let folder = file.parent().unwrap_or(Path::new("")).to_owned();
        walk.file(&file, &folder, true);
    }
    walk.strays();
    wrong.append(&mut walk.wrong);
    walk.claims
}

struct Walk<'a> {
    root: &'a Path,
    seen: BTreeSet<PathBuf>,
    claims: BTreeSet<Claim>,
    wrong: Wrongs,
}

/// Where items stand.
#[derive(Clone, Copy)]
struct Place<'a> {
    file: &'a Path,
    /// Where the files of `mod name;` are.
    modules: &'a Path,
    /// Where `#[path]` begins.
    paths: &'a Path,
    /// Whether a test here is run.
    runs: bool,
}

/// The attributes before an item.
#[derive(Default)]
struct Attributes {
    docs: Vec<(usize, String)>,
    is_test: bool,
    is_ignored: bool,
    is_off: bool,
    path: Option<String>,
}

impl Attributes {
    /// Takes one attribute: the inside of its brackets.
    fn take(&mut self, attribute: &Group) {
        let tokens: Vec<TokenTree> = attribute.stream().into_iter().collect();
        let line = attribute.span().start().line;
        // The last word before `=` or the arguments: `test` of `tokio::test(start_paused = true)`.
        let names = tokens.iter().map_while(|token| match token {
            TokenTree::Ident(name) => Some(Some(name.to_string())),
            TokenTree::Punct(punct) if punct.as_char() == ':' => Some(None),
            _ => None,
        });
        let name = names.flatten().last().unwrap_or_default();
        match (name.as_str(), tokens.last()) {
            ("doc", Some(TokenTree::Literal(text))) => self.docs.push((line, text_of(&text.to_string()))),
            ("path", Some(TokenTree::Literal(text))) => self.path = Some(text_of(&text.to_string())),
            ("test", _) => self.is_test = true,
            ("ignore", _) => self.is_ignored = true,
            ("cfg", Some(TokenTree::Group(predicate))) => self.is_off |= !cfg::holds(predicate.stream()),
            // Whatever its condition: a test that is sometimes ignored is not one to rely on.
            ("cfg_attr", Some(TokenTree::Group(inner))) => {
                self.is_ignored |=
                    inner.stream().to_string().split(|c: char| !c.is_alphanumeric()).any(|w| w == "ignore");
            }
            _ => {}
        }
    }
}

/// The text of a literal, but for its escapes, which stand in no id.
fn text_of(literal: &str) -> String {
    literal.trim_start_matches(['r', '#']).trim_end_matches('#').trim_matches('"').replace("\\\"", "\"")
}

impl Walk<'_> {
    fn file(&mut self, file: &Path, modules: &Path, runs: bool) {
        self.seen.insert(file.to_owned());
        let text = match std::fs::read_to_string(self.root.join(file)) {
            Ok(text) => text,
            Err(error) => return self.complain(file, 1, &error.to_string()),
        };
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        match text.parse::<TokenStream>() {
            Ok(tokens) => {
                let paths = file.parent().unwrap_or(Path::new("")).to_owned();
                self.items(tokens, Place { file, modules, paths: &paths, runs });
            }
            Err(error) => self.complain(file, error.span().start().line, "cannot be read as Rust"),
        }
    }

    fn complain(&mut self, file: &Path, line: usize, what: &str) {
        self.wrong.insert((file.display().to_string(), line, what.to_owned()));
    }

    /// The items of a file, of an inline module, or of `proptest!`.
    fn items(&mut self, tokens: TokenStream, mut place: Place<'_>) {
        let tokens: Vec<TokenTree> = tokens.into_iter().collect();
        let mut attributes = Attributes::default();
        let mut at = 0;
        while let Some(token) = tokens.get(at) {
            match (token, tokens.get(at + 1), tokens.get(at + 2)) {
                (TokenTree::Punct(hash), Some(TokenTree::Group(attribute)), _) if hash.as_char() == '#' => {
                    attributes.take(attribute);
                    at += 1;
                }
                (TokenTree::Punct(hash), Some(TokenTree::Punct(bang)), Some(TokenTree::Group(attribute)))
                    if hash.as_char() == '#' && bang.as_char() == '!' =>
                {
                    let mut inner = Attributes::default();
                    inner.take(attribute);
                    place.runs &= !inner.is_off;
                    self.no_claims(place.file, &inner);
                    at += 2;
                }
                (TokenTree::Ident(word), Some(TokenTree::Ident(name)), _) if *word == "mod" => {
                    at +=
                        self.module(&tokens[at + 2..], &name.to_string(), &std::mem::take(&mut attributes), place) + 1;
                }
                (TokenTree::Ident(word), Some(TokenTree::Ident(_)), _) if *word == "fn" => {
                    at += self.function(&tokens[at..], &std::mem::take(&mut attributes), place);
                }
                (TokenTree::Ident(word), Some(TokenTree::Punct(bang)), Some(TokenTree::Group(body)))
                    if *word == "proptest" && bang.as_char() == '!' =>
                {
                    self.no_claims(place.file, &std::mem::take(&mut attributes));
                    self.items(body.stream(), place);
                    at += 2;
                }
                (TokenTree::Group(group), ..) => {
                    self.inside(group.stream(), place.file);
                    if group.delimiter() == Delimiter::Brace {
                        self.no_claims(place.file, &std::mem::take(&mut attributes));
                    }
                }
                (TokenTree::Punct(end), ..) if end.as_char() == ';' => {
                    self.no_claims(place.file, &std::mem::take(&mut attributes));
                }
                _ => {}
            }
            at += 1;
        }
    }

    /// `mod name;` or `mod name { … }`; `after` is what follows the name. Returns the tokens taken.
    fn module(&mut self, after: &[TokenTree], name: &str, attributes: &Attributes, place: Place<'_>) -> usize {
        self.no_claims(place.file, attributes);
        let runs = place.runs && !attributes.is_off;
        let name = name.trim_start_matches("r#");
        if let Some(TokenTree::Group(body)) = after.first() {
            let folder = place.modules.join(name);
            self.items(body.stream(), Place { modules: &folder, paths: &folder, runs, ..place });
            return 1;
        }
        let (file, modules) = match &attributes.path {
            Some(path) => {
                let file = tidy(&place.paths.join(path));
                let folder = file.parent().unwrap_or(Path::new("")).to_owned();
                (file, folder)
            }
            None => {
                let file = place.modules.join(format!("{name}.rs"));
                let folder = place.modules.join(name);
                if self.root.join(&file).is_file() { (file, folder) } else { (folder.join("mod.rs"), folder) }
            }
        };
        if runs || !self.seen.contains(&file) {
            self.file(&file, &modules, runs);
        }
        1
    }

    /// A function, from its `fn` on. Returns the tokens before its last one.
    fn function(&mut self, tokens: &[TokenTree], attributes: &Attributes, place: Place<'_>) -> usize {
        let end = tokens.iter().position(|token| match token {
            TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
            TokenTree::Punct(punct) => punct.as_char() == ';',
            _ => false,
        });
        let end = end.unwrap_or(tokens.len() - 1);
        let body = match &tokens[end] {
            TokenTree::Group(body) => body.stream(),
            _ => TokenStream::new(),
        };
        let why_not = if !attributes.is_test {
            Some("what is no test")
        } else if attributes.is_ignored {
            Some("an ignored test")
        } else if !place.runs || attributes.is_off {
            Some("a test that is turned off")
        } else if body.is_empty() {
            Some("a test without a body")
        } else {
            None
        };
        match why_not {
            Some(kind) => self.claims_of(place.file, attributes, |_, _| {}, Some(kind)),
            None => {
                let mut ids = BTreeSet::new();
                let mut claims = Vec::new();
                let mut twice = Vec::new();
                self.claims_of(
                    place.file,
                    attributes,
                    |id, line| {
                        if !ids.insert(id) {
                            twice.push((id, line));
                        }
                        claims.push(Claim { id, file: place.file.display().to_string(), line });
                    },
                    None,
                );
                for (id, line) in twice {
                    self.complain(place.file, line, &format!("names {id} twice"));
                }
                self.claims.extend(claims);
            }
        }
        self.inside(body, place.file);
        end
    }

    /// Doc lines of what is no test.
    fn no_claims(&mut self, file: &Path, attributes: &Attributes) {
        self.claims_of(file, attributes, |_, _| {}, Some("what is no test"));
    }

    fn claims_of(&mut self, file: &Path, attributes: &Attributes, mut keep: impl FnMut(Id, usize), not: Option<&str>) {
        for (line, text) in &attributes.docs {
            for (more, text) in text.replace("\\n", "\n").lines().enumerate() {
                match (claim::claims(text), not) {
                    (Ok(ids), None) => ids.into_iter().for_each(|id| keep(id, line + more)),
                    (Ok(ids), Some(kind)) => {
                        for id in ids {
                            self.complain(file, line + more, &format!("{id} is named by {kind}"));
                        }
                    }
                    // The tables of other things may have columns of ids, too.
                    (Err(_), Some("what is no test")) => {}
                    (Err(what), _) => self.complain(file, line + more, what),
                }
            }
        }
    }

    /// The inside of anything but a module: no test there is run.
    fn inside(&mut self, tokens: TokenStream, file: &Path) {
        let mut attributes = Attributes::default();
        let mut after_hash = false;
        for token in tokens {
            match &token {
                TokenTree::Group(group) if after_hash && group.delimiter() == Delimiter::Bracket => {
                    attributes.take(group)
                }
                TokenTree::Group(group) => self.inside(group.stream(), file),
                _ => {}
            }
            after_hash = matches!(&token, TokenTree::Punct(punct) if matches!(punct.as_char(), '#' | '!'));
        }
        self.no_claims(file, &attributes);
    }

    /// Files that no `mod` names must not look as if they showed anything.
    fn strays(&mut self) {
        let mut open = ["src", "exec", "tests", "vm-images"].map(PathBuf::from).to_vec();
        while let Some(folder) = open.pop() {
            for entry in std::fs::read_dir(self.root.join(&folder)).into_iter().flatten().flatten() {
                let path = folder.join(entry.file_name());
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    if entry.file_name() != "target" {
                        open.push(path);
                    }
                } else if path.extension().is_some_and(|extension| extension == "rs") && !self.seen.contains(&path) {
                    self.stray(&path);
                }
            }
        }
    }

    fn stray(&mut self, file: &Path) {
        let text = std::fs::read_to_string(self.root.join(file)).unwrap_or_default();
        for (at, line) in text.lines().enumerate() {
            let doc = line.trim_start().strip_prefix("///").unwrap_or_default();
            for id in claim::claims(doc).unwrap_or_default() {
                self.complain(file, at + 1, &format!("{id} is named in a file that no ring's crate includes"));
            }
        }
    }
}

/// The path without `..`.
fn tidy(path: &Path) -> PathBuf {
    let mut tidy = PathBuf::new();
    for part in path.components() {
        if part.as_os_str() == ".." {
            tidy.pop();
        } else if part.as_os_str() != "." {
            tidy.push(part);
        }
    }
    tidy
}
