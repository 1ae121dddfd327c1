//! What a job's author asks for: whatever it is, a machine within bounds or one line.

use bytes::Bytes;
use dayfly::config::Class;
use dayfly::gitlab::JobPayload;
use dayfly::job::wishes::Wishes;
use dayfly::machine_spec::Size;
use dayfly::rules::{Facts, Rule, decide};
use serde_json::json;

/// Characters of a line for authors at most: a wish is quoted in part.
const LINE_CHARS_MAX: usize = 400;

/// Six texts with a NUL between two: `DAYFLY_IMAGE` and `image:`, `DAYFLY_CPUS`, `DAYFLY_MEMORY`, `DAYFLY_DISK`, a
/// project's path and a ref, both of which are patterns of a rule, too. What comes of them is a machine that is no larger
/// than what its class and the room allow, or one printable line; the same texts always do the same.
pub fn wishes(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let texts: Vec<&str> = text.splitn(6, '\0').chain(std::iter::repeat_n("", 6)).take(6).collect();
    let payload = json!({
        "id": 7, "token": "glcbt-x",
        "image": {"name": texts[0]},
        "variables": [
            {"key": "DAYFLY_IMAGE", "value": texts[0]}, {"key": "DAYFLY_CPUS", "value": texts[1]},
            {"key": "DAYFLY_MEMORY", "value": texts[2]}, {"key": "DAYFLY_DISK", "value": texts[3]},
        ],
        "job_info": {"project_full_path": texts[4]},
        "git_info": {"ref": texts[5]},
    });
    let payload = JobPayload::parse(Bytes::from(payload.to_string()), None).expect("it is a payload");
    let (max_cpus, max_memory_mib, max_disk_gib) = (Some(8), Some(8192), Some(80));
    let class = Class { images: vec!["b".into()], max_cpus, max_memory_mib, max_disk_gib, ..Class::new("c", "a") };
    let reserved = Size { cpus: 6, memory_mib: 6000, disk_gib: 60 };
    let line = |line: String| {
        let chars = line.chars().count();
        assert!(chars <= LINE_CHARS_MAX && !line.chars().any(char::is_control), "{line:?}");
    };
    match Wishes::read(&payload.asked) {
        Ok(wishes) => {
            match wishes.size_within(&class, reserved) {
                Ok(size) => {
                    assert!((1..=reserved.cpus).contains(&size.cpus), "{size:?}");
                    assert!((1..=reserved.memory_mib).contains(&size.memory_mib), "{size:?}");
                    assert!((1..=reserved.disk_gib).contains(&size.disk_gib), "{size:?}");
                }
                Err(why) => line(why),
            }
            match wishes.image_of(&class) {
                Ok(image) => assert!(matches!(image, None | Some("a" | "b")), "{image:?}"),
                Err(why) => line(why),
            }
            wishes.words().into_iter().for_each(line);
        }
        Err(why) => line(why),
    }
    let rule = |set: fn(&mut Rule, String), text: &str| {
        let mut rule = Rule { name: "r".into(), allow: true, ..Rule::default() };
        set(&mut rule, text.to_owned());
        rule
    };
    let facts = Facts {
        project: payload.source.project.as_deref(),
        git_ref: payload.source.git_ref.as_deref(),
        image: "a",
        ..Facts::default()
    };
    let rules = [
        rule(|rule, text| rule.project = vec![text], texts[5]),
        rule(|rule, text| rule.git_ref = vec![text], texts[4]),
        rule(|rule, text| rule.group = vec![text], texts[5]),
        rule(|_, _| (), ""),
    ];
    let outcome = decide(&rules, &facts);
    assert_eq!(outcome, decide(&rules, &facts));
    assert!(outcome.decided.is_some_and(|rule| rule.fits(&facts)), "the last rule fits every job");
    rules.iter().for_each(|rule| drop(rule.flaws()));
}
