//! What an image says of itself: its manifest, the header of its disk, and the partitions in there.

use dayfly::image::gpt;
use dayfly::image::manifest::{BootKind, Manifest};
use dayfly::image::qcow2;

/// A disk's header leads to no other file; a manifest is read as it would be written, and names files of its own
/// directory only; a table of partitions has no more of them than there is room for.
pub fn image(input: &[u8]) {
    let number = |from: usize, bytes: usize| {
        input
            .get(from..from + bytes)
            .map(|bytes| bytes.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte)))
    };
    if let Ok(bytes) = qcow2::parse(input) {
        assert!(input.starts_with(b"QFI\xfb") && bytes > 0 && number(24, 8) == Some(bytes));
        assert_eq!((number(8, 8), number(16, 4), number(32, 4)), (Some(0), Some(0), Some(0)), "backing file or cipher");
        let external = number(4, 4) == Some(3) && number(72, 8).is_none_or(|features| features & 0b100 != 0);
        assert!(!external, "its data is in another file");
    }
    if let Some(partitions) = gpt::read(input) {
        assert!(input[512..].starts_with(b"EFI PART") && partitions.len() <= 128);
        for partition in partitions {
            assert!(partition.offset() % gpt::SECTOR == 0 || partition.offset() == u64::MAX);
            assert!(!(partition.is_bios_boot() && partition.root_of().is_some()));
        }
    }
    let Ok(text) = std::str::from_utf8(input) else { return };
    let Ok(manifest) = Manifest::parse(text) else { return };
    for file in manifest.files() {
        let name = std::path::Path::new(&file.file);
        assert_eq!(name.file_name(), Some(name.as_os_str()), "{name:?} leads elsewhere");
    }
    assert_eq!(manifest.boot == BootKind::Direct, manifest.kernel.is_some());
    let again = Manifest::parse(&manifest.to_text()).expect("what was read can be written and read");
    assert_eq!(again, manifest);
    assert_eq!(again.info.is_some(), again.runner_info().is_some());
}
