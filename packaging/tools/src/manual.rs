//! What do `man dayfly` and a shell's tab key say? What the command line says of itself.

use clap::Command;
use clap_complete::{Shell, generate};
use std::fs;
use std::io;
use std::path::Path;

/// Where each shell looks for completions, below `/usr/share`.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "bash-completion/completions/dayfly"),
    (Shell::Zsh, "zsh/vendor-completions/_dayfly"),
    (Shell::Fish, "fish/vendor_completions.d/dayfly.fish"),
];

/// Writes below `share`, which is to become `/usr/share`, a page for each command (`man/man1`) and the completions.
///
/// # Errors
/// Those of the file system.
pub fn write(share: &Path) -> io::Result<()> {
    let pages = share.join("man/man1");
    fs::create_dir_all(&pages)?;
    clap_mangen::generate_to(dayfly::cli::command(), &pages)?;
    // Of `dayfly exec` the daemon's program knows the name only; this one takes that page's place.
    clap_mangen::generate_to(dayfly_exec::command(), &pages)?;
    for (shell, file) in COMPLETIONS {
        let file = share.join(file);
        if let Some(directory) = file.parent() {
            fs::create_dir_all(directory)?;
        }
        generate(shell, &mut whole(), "dayfly", &mut fs::File::create(file)?);
    }
    Ok(())
}

/// The command line with the options of `exec` in it, which are those of another program.
fn whole() -> Command {
    dayfly::cli::command().mut_subcommand("exec", |_| dayfly_exec::command().name("exec"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(command: &Command, of: &str, found: &mut Vec<String>) {
        let name = if of.is_empty() { command.get_name().to_owned() } else { format!("{of}-{}", command.get_name()) };
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
            names(sub, &name, found);
        }
        found.push(name);
    }

    #[test]
    fn every_command_has_a_page_and_every_shell_knows_them() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path()).unwrap();
        let mut pages = Vec::new();
        names(&dayfly::cli::command(), "", &mut pages);
        assert!(pages.iter().any(|page| page == "dayfly-image-build"), "{pages:?}");
        for page in &pages {
            let file = dir.path().join(format!("man/man1/{page}.1"));
            let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            assert!(text.contains(".SH NAME") && text.contains(".SH SYNOPSIS"), "{page}: {text}");
        }
        // Options of a program that `dayfly exec` only finds.
        let exec = fs::read_to_string(dir.path().join("man/man1/dayfly-exec.1")).unwrap();
        assert!(exec.contains("image\\-directory"), "{exec}");
        for (_, file) in COMPLETIONS {
            let text = fs::read_to_string(dir.path().join(file)).unwrap();
            for word in ["register", "rollback", "image-directory", "runner-download"] {
                assert!(text.contains(word), "no {word} in {file}");
            }
        }
    }
}
