//! What machine does a job ask for by its variables, and is that within its class's bounds?
//!
//! Pure: text of authors goes in. Whatever is no wish, or more than is allowed, comes out as one line that tells its
//! author what is.

use crate::config::Class;
use crate::gitlab::Asked;
use crate::machine_spec::Size;

/// The smallest machine that a job may ask for, if its class has no smaller one: a guest with less memory does not start
/// its runner.
const MIN: Size = Size { cpus: 1, memory_mib: 256, disk_gib: 1 };

/// Characters of a wish that are quoted to its author.
const QUOTED_CHARS_MAX: usize = 60;

/// Images that are named to an author at most.
const IMAGES_NAMED_MAX: usize = 12;

/// What a job asks for, in our units. What is `None` is the class's to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// `DAYFLY_IMAGE`.
    pub image: Option<String>,
    /// `DAYFLY_CPUS`.
    pub cpus: Option<u32>,
    /// `DAYFLY_MEMORY`, MiB.
    pub memory_mib: Option<u64>,
    /// `DAYFLY_DISK`, GiB.
    pub disk_gib: Option<u64>,
}

impl Wishes {
    /// Reads them.
    ///
    /// # Errors
    /// The author's line about the first that is none.
    pub fn read(asked: &Asked) -> Result<Self, String> {
        let cpus = |text: &String| {
            digits(text).and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0).ok_or_else(|| {
                format!("`DAYFLY_CPUS` is `{}`, which is no number of CPUs: write a whole number like 4", quoted(text))
            })
        };
        let size = |name: &str, text: &String, plain: u64, unit: u64, example: &str| {
            bytes(text, plain).filter(|bytes| *bytes > 0).map(|bytes| bytes.div_ceil(unit)).ok_or_else(|| {
                format!(
                    "`{name}` is `{}`, which is no size: write a whole number with MiB, GiB or TiB, like {example}",
                    quoted(text)
                )
            })
        };
        let memory = |text: &String| size("DAYFLY_MEMORY", text, MIB, MIB, "4GiB");
        let disk = |text: &String| size("DAYFLY_DISK", text, GIB, GIB, "40GiB");
        Ok(Self {
            image: asked.image.clone(),
            cpus: asked.cpus.as_ref().map(cpus).transpose()?,
            memory_mib: asked.memory.as_ref().map(memory).transpose()?,
            disk_gib: asked.disk.as_ref().map(disk).transpose()?,
        })
    }

    /// The size of a machine of this class that is asked for, whether it may be had or not.
    #[must_use]
    pub fn size(&self, class: &Class) -> Size {
        let size = class.size();
        Size {
            cpus: self.cpus.unwrap_or(size.cpus),
            memory_mib: self.memory_mib.unwrap_or(size.memory_mib),
            disk_gib: self.disk_gib.unwrap_or(size.disk_gib),
        }
    }

    /// The size that the job gets in this class, which is never more than `reserved`.
    ///
    /// # Errors
    /// The author's line about the first wish that is out of bounds.
    pub fn size_within(&self, class: &Class, reserved: Size) -> Result<Size, String> {
        let (own, most, wanted) = (class.size(), smaller(class.ceiling(), reserved), self.size(class));
        let least = smaller(MIN, own);
        let check = |name: &str, asked: bool, wanted: u64, least: u64, most: u64, words: fn(u64) -> String| {
            if !asked || (least..=most).contains(&wanted) {
                return Ok(());
            }
            let range = if least == most { words(most) } else { format!("from {} to {}", words(least), words(most)) };
            Err(format!("`{name}` asks for {}; here jobs may have {range}", words(wanted)))
        };
        let (cpus, memory, disk) = (self.cpus.is_some(), self.memory_mib.is_some(), self.disk_gib.is_some());
        check("DAYFLY_CPUS", cpus, wanted.cpus.into(), least.cpus.into(), most.cpus.into(), cpu_words)?;
        check("DAYFLY_MEMORY", memory, wanted.memory_mib, least.memory_mib, most.memory_mib, memory_words)?;
        check("DAYFLY_DISK", disk, wanted.disk_gib, least.disk_gib, most.disk_gib, disk_words)?;
        Ok(smaller(wanted, reserved))
    }

    /// The image that `DAYFLY_IMAGE` names; `None`: it names none.
    ///
    /// # Errors
    /// The author's line: it is none of the class's.
    pub fn image_of<'a>(&self, class: &'a Class) -> Result<Option<&'a str>, String> {
        let Some(wanted) = &self.image else { return Ok(None) };
        let image = class.all_images().find(|image| image == wanted);
        image.map(Some).ok_or_else(|| {
            format!("`DAYFLY_IMAGE` asks for `{}`; here jobs may have {}", quoted(wanted), images(class))
        })
    }

    /// Them, for the author's log; `None`: nothing is asked for.
    #[must_use]
    pub fn words(&self) -> Option<String> {
        let words: Vec<String> = [
            self.image.as_ref().map(|image| format!("image {}", quoted(image))),
            self.cpus.map(|cpus| cpu_words(cpus.into())),
            self.memory_mib.map(|mib| format!("{} memory", memory_words(mib))),
            self.disk_gib.map(|gib| format!("{} disk", disk_words(gib))),
        ]
        .into_iter()
        .flatten()
        .collect();
        (!words.is_empty()).then(|| words.join(", "))
    }
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn smaller(a: Size, b: Size) -> Size {
    Size { cpus: a.cpus.min(b.cpus), memory_mib: a.memory_mib.min(b.memory_mib), disk_gib: a.disk_gib.min(b.disk_gib) }
}

/// The images of a class, for its jobs' authors.
pub(super) fn images(class: &Class) -> String {
    let names: Vec<String> = class.all_images().take(IMAGES_NAMED_MAX + 1).map(|name| format!("`{name}`")).collect();
    match names.get(..IMAGES_NAMED_MAX) {
        Some(first) if names.len() > IMAGES_NAMED_MAX => format!("{} and others", first.join(", ")),
        _ => names.join(", "),
    }
}

/// Part of a wish, fit for a line.
pub(super) fn quoted(text: &str) -> String {
    let mut plain: String =
        text.chars().take(QUOTED_CHARS_MAX).map(|c| if c.is_control() || c == '`' { ' ' } else { c }).collect();
    if text.chars().count() > QUOTED_CHARS_MAX {
        plain.push('…');
    }
    plain
}

/// Digits alone, and no more of them than a number holds.
fn digits(text: &str) -> Option<u64> {
    let all = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if all { text.parse().ok() } else { None }
}

/// A size in bytes: a whole number and its unit, whatever the case. Units of 1024 as they are said here, in short or not
/// (`GiB`, `Gi`, `G`), those of 1000 with their `B` (`GB`). `plain`: what a number without one counts in.
fn bytes(text: &str, plain: u64) -> Option<u64> {
    let at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let factor = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" => plain,
        "m" | "mi" | "mib" => MIB,
        "g" | "gi" | "gib" => GIB,
        "t" | "ti" | "tib" => GIB << 10,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return None,
    };
    digits(number)?.checked_mul(factor)
}

fn cpu_words(cpus: u64) -> String {
    if cpus == 1 { "1 CPU".to_owned() } else { format!("{cpus} CPUs") }
}

fn memory_words(mib: u64) -> String {
    if mib > 0 && mib.is_multiple_of(1024) { format!("{} GiB", mib / 1024) } else { format!("{mib} MiB") }
}

fn disk_words(gib: u64) -> String {
    format!("{gib} GiB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What a job asks for: CPUs, memory, disk.
    fn asked(cpus: &str, memory: &str, disk: &str) -> Asked {
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Asked { cpus: some(cpus), memory: some(memory), disk: some(disk), ..Asked::default() }
    }

    fn class() -> Class {
        Class {
            images: vec!["b".into()],
            max_cpus: Some(8),
            max_memory_mib: Some(8192),
            max_disk_gib: Some(50),
            ..Class::new("c", "a")
        }
    }

    fn given(cpus: &str, memory: &str, disk: &str) -> Result<(u32, u64, u64), String> {
        let class = class();
        let size = Wishes::read(&asked(cpus, memory, disk))?.size_within(&class, class.ceiling())?;
        Ok((size.cpus, size.memory_mib, size.disk_gib))
    }

    #[test]
    fn sizes_have_units_and_a_plain_number_is_the_configurations() {
        assert_eq!(given("", "", ""), Ok((2, 2048, 20)));
        assert_eq!(given("8", "8GiB", "50GiB"), Ok((8, 8192, 50)));
        assert_eq!(given("1", "4096", "30"), Ok((1, 4096, 30)));
        assert_eq!(given("", "4 gib", "0.5"), Err(line("DAYFLY_DISK", "0.5", "40GiB")));
        for (text, mib) in [("512M", 512), ("512Mi", 512), ("512MiB", 512), ("1g", 1024), ("2GB", 1908)] {
            assert_eq!(given("", text, ""), Ok((2, mib, 20)), "{text}");
        }
        // A disk is whole GiB.
        assert_eq!(given("", "", "1025MiB"), Ok((2, 2048, 2)));
    }

    fn line(name: &str, text: &str, example: &str) -> String {
        format!("`{name}` is `{text}`, which is no size: write a whole number with MiB, GiB or TiB, like {example}")
    }

    /// What authors write by mistake, or try: each is told, and none is a number that runs over.
    #[test]
    fn what_is_no_wish_is_told_with_what_would_be() {
        for text in
            ["1e99", "-1", "8 parsecs", "0", "0GiB", "GiB", "1.5GiB", "١GiB", "4GiB ; reboot", "99999999999999999999"]
        {
            assert_eq!(given("", text, ""), Err(line("DAYFLY_MEMORY", text, "4GiB")), "{text}");
        }
        assert_eq!(
            given("", "18446744073709551615TiB", ""),
            Err(line("DAYFLY_MEMORY", "18446744073709551615TiB", "4GiB"))
        );
        for text in ["1e99", "-1", "0", "two", "4294967296", "2.0"] {
            let error = given(text, "", "").unwrap_err();
            assert!(error.contains(text) && error.ends_with("write a whole number like 4"), "{error}");
        }
        let long = given("", &"9\u{7}`".repeat(100), "").unwrap_err();
        assert!(long.len() < 250 && !long.contains('\u{7}') && long.contains('…'), "{long}");
    }

    #[test]
    fn a_wish_out_of_bounds_is_told_with_the_bounds() {
        assert_eq!(
            given("9", "", "").unwrap_err(),
            "`DAYFLY_CPUS` asks for 9 CPUs; here jobs may have from 1 CPU to 8 CPUs"
        );
        assert_eq!(
            given("", "64GiB", "").unwrap_err(),
            "`DAYFLY_MEMORY` asks for 64 GiB; here jobs may have from 256 MiB to 8 GiB"
        );
        assert_eq!(
            given("", "100M", "").unwrap_err(),
            "`DAYFLY_MEMORY` asks for 100 MiB; here jobs may have from 256 MiB to 8 GiB"
        );
        assert_eq!(
            given("", "", "51").unwrap_err(),
            "`DAYFLY_DISK` asks for 51 GiB; here jobs may have from 1 GiB to 50 GiB"
        );
        // Without bounds of its own a class allows less than it gives, and no more.
        let plain = Class { memory_mib: 256, cpus: 1, ..Class::new("c", "a") };
        let within = |memory: &str| Wishes::read(&asked("", memory, "")).unwrap().size_within(&plain, plain.ceiling());
        assert_eq!(within("257").unwrap_err(), "`DAYFLY_MEMORY` asks for 257 MiB; here jobs may have 256 MiB");
        assert!(within("256").is_ok());
    }

    #[test]
    fn an_image_is_one_of_the_classs() {
        let image = |name: &str| {
            let wishes = Wishes { image: Some(name.into()), ..Wishes::default() };
            wishes.image_of(&class()).map(|image| image.map(str::to_owned))
        };
        assert_eq!(image("b"), Ok(Some("b".into())));
        assert_eq!(image("a"), Ok(Some("a".into())));
        assert_eq!(image("../a").unwrap_err(), "`DAYFLY_IMAGE` asks for `../a`; here jobs may have `a`, `b`");
        let many = Class { images: (0..99).map(|n| format!("i{n}")).collect(), ..class() };
        assert!(images(&many).ends_with("`i10` and others"), "{}", images(&many));
    }

    #[test]
    fn wishes_are_told_in_words() {
        let wishes = Wishes::read(&Asked { image: Some("b".into()), ..asked("4", "4GiB", "40") }).unwrap();
        assert_eq!(wishes.words().unwrap(), "image b, 4 CPUs, 4 GiB memory, 40 GiB disk");
        assert_eq!(Wishes::default().words(), None);
    }

    proptest! {
        /// Whatever an author writes: a machine within both bounds, or one line.
        #[test]
        fn any_wish_is_a_machine_within_bounds_or_a_line(
            cpus in "[0-9a-zA-Z ./-]{0,20}", memory in "\\PC{0,40}|[0-9]{1,20} ?[kmgtKMGT]?i?[bB]?", disk in ".{0,40}|[0-9]{1,20}",
            reserved in (1u32..16, 1u64..10_000, 1u64..100),
        ) {
            let reserved = Size { cpus: reserved.0, memory_mib: reserved.1, disk_gib: reserved.2 };
            let class = class();
            match Wishes::read(&asked(&cpus, &memory, &disk)).and_then(|wishes| wishes.size_within(&class, reserved)) {
                Ok(size) => {
                    let most = smaller(class.ceiling(), reserved);
                    prop_assert_eq!(smaller(size, most), size);
                    prop_assert!(size.cpus > 0 && size.memory_mib > 0 && size.disk_gib > 0);
                }
                Err(line) => {
                    prop_assert!(line.chars().count() < 300 && !line.chars().any(char::is_control), "{}", line);
                }
            }
        }
    }
}
