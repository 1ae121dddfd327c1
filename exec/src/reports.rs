//! Reports of a job onto the developer's disk, as they are in GitLab's archive: unpacked, under their own names.
//!
//! The runner packs most reports with gzip, one member for each file, and names the upload `junit.xml.gz` or `.env.gz`.
//! Here the members become `junit.xml`, `junit-2.xml` and so on. Bytes, ratio and number of members have limits, as
//! archives have (threats.md T38); what is no gzip is stored as it came. Blocks, as [`super::unpack`].

use super::unpack::{Budget, Folder, UnpackError, clean, create, file_name, make_directories, remove};
use flate2::bufread::GzDecoder;
use std::io::{self, BufRead, BufReader, Read, Write as _};
use std::path::{Path, PathBuf};

/// Files of one report at most. A build with a test report for each of its classes has hundreds.
const MEMBERS_MAX: usize = 1000;

/// A report as it was uploaded; all words are the guest's.
pub(super) struct Report<'a, R> {
    /// `junit`.
    pub(super) kind: &'a str,
    /// `junit.xml.gz`.
    pub(super) filename: &'a str,
    /// Whether it says that it is packed.
    pub(super) gzip: bool,
    /// Its bytes.
    pub(super) content: R,
}

impl Folder {
    /// Stores a report of `job`, and returns where: a file, or several of one.
    ///
    /// # Errors
    /// [`UnpackError`]; nothing of the report is on disk then.
    pub(super) fn store_report<R: Read>(&self, job: &str, report: Report<'_, R>) -> Result<Vec<PathBuf>, UnpackError> {
        let directory = self.reports_directory(job).join(file_name(report.kind));
        make_directories(&directory)?;
        let mut stored = Vec::new();
        let result = self.store_members(report, &directory, &mut stored);
        if result.is_err() {
            for path in &stored {
                remove(path)?;
            }
        }
        result.map(|()| stored)
    }

    fn store_members<R: Read>(
        &self,
        report: Report<'_, R>,
        directory: &Path,
        stored: &mut Vec<PathBuf>,
    ) -> Result<(), UnpackError> {
        let Report { kind, filename, gzip, content } = report;
        let mut content = BufReader::new(Counted { content, bytes: 0 });
        let mut budget = Budget { limits: self.limits, packed: 0, bytes: 0 };
        let broken = |_| UnpackError::Refused { name: filename.into(), what: "cannot be unpacked: its data is broken" };
        let is_packed = |content: &mut BufReader<_>| {
            BufRead::fill_buf(content).map(|bytes| bytes.starts_with(&[0x1f, 0x8b])).map_err(broken)
        };
        if !gzip || !is_packed(&mut content)? {
            let path = directory.join(report_name(kind, filename, 1));
            stored.push(path.clone());
            return copy(&mut content, &path, filename, |bytes| budget.exceeded(bytes, bytes));
        }
        let own = filename.strip_suffix(".gz").unwrap_or(filename);
        while is_packed(&mut content)? {
            if stored.len() >= MEMBERS_MAX {
                return Err(UnpackError::TooLarge {
                    name: filename.into(),
                    what: format!("more than {MEMBERS_MAX} files"),
                });
            }
            let path = directory.join(report_name(kind, own, stored.len() + 1));
            stored.push(path.clone());
            let mut member = GzDecoder::new(content);
            let mut bytes = 0;
            let file = create(&path, false).map_err(|source| UnpackError::Write { path: path.clone(), source })?;
            let mut file = io::BufWriter::new(file);
            let mut buffer = vec![0; 64 * 1024];
            loop {
                let count = member.read(&mut buffer).map_err(broken)?;
                let chunk = buffer.get(..count).unwrap_or_default();
                if chunk.is_empty() {
                    break;
                }
                bytes += chunk.len() as u64;
                let packed = member.get_ref().get_ref().bytes;
                if let Some(what) = budget.exceeded(packed, bytes) {
                    return Err(UnpackError::TooLarge { name: filename.into(), what });
                }
                file.write_all(chunk).map_err(|source| UnpackError::Write { path: path.clone(), source })?;
            }
            file.flush().map_err(|source| UnpackError::Write { path: path.clone(), source })?;
            budget.bytes = budget.bytes.saturating_add(bytes);
            content = member.into_inner();
        }
        // Something behind the last member is nothing that a runner writes.
        match content.fill_buf().map_err(broken)? {
            [] => Ok(()),
            _ => Err(UnpackError::Refused { name: filename.into(), what: "has something behind its end" }),
        }
    }
}

/// Copies as it is; `exceeded` judges the number of bytes.
fn copy(
    content: &mut impl Read,
    path: &Path,
    filename: &str,
    exceeded: impl Fn(u64) -> Option<String>,
) -> Result<(), UnpackError> {
    let unwritable = |source| UnpackError::Write { path: path.to_owned(), source };
    let mut file = create(path, false).map_err(unwritable)?;
    let mut buffer = vec![0; 64 * 1024];
    let mut bytes = 0;
    loop {
        let count = content.read(&mut buffer).map_err(unwritable)?;
        let chunk = buffer.get(..count).unwrap_or_default();
        if chunk.is_empty() {
            return Ok(());
        }
        bytes += chunk.len() as u64;
        if let Some(what) = exceeded(bytes) {
            return Err(UnpackError::TooLarge { name: filename.into(), what });
        }
        file.write_all(chunk).map_err(unwritable)?;
    }
}

/// The name of the `number`th file of a report: `junit.xml`, `junit-2.xml`.
fn report_name(kind: &str, filename: &str, number: usize) -> String {
    let name = match filename {
        // The one name with a leading dot that GitLab gives; others could mean something to a program.
        ".env" if kind == "dotenv" => ".env".to_owned(),
        _ => file_name(filename),
    };
    if number == 1 {
        return name;
    }
    match name.rsplit_once('.').filter(|(stem, _)| !stem.is_empty()) {
        Some((stem, extension)) => format!("{stem}-{number}.{extension}"),
        None => format!("{name}-{number}"),
    }
}

/// Bytes read so far, of all members.
struct Counted<R> {
    content: R,
    bytes: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.content.read(buffer)?;
        self.bytes += count as u64;
        Ok(count)
    }
}

/// For messages: the paths of one report.
pub(super) fn shown(paths: &[PathBuf]) -> String {
    match paths {
        [] => "none".to_owned(),
        [path] => clean(path.as_os_str().as_encoded_bytes()),
        [first, ..] => format!("{} and {} more", clean(first.as_os_str().as_encoded_bytes()), paths.len() - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::super::unpack::Limits;
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::fs;

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    struct Scene {
        dir: tempfile::TempDir,
        folder: Folder,
    }

    impl Scene {
        fn new(limits: Limits) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let folder = Folder::open(&dir.path().join("out"), limits).unwrap();
            Self { dir, folder }
        }

        fn store(&self, kind: &str, filename: &str, content: &[u8]) -> Result<Vec<String>, String> {
            let report = Report { kind, filename, gzip: filename.ends_with(".gz"), content };
            let paths = self.folder.store_report("a/b", report).map_err(|error| error.to_string())?;
            let root = self.dir.path().canonicalize().unwrap().join("out/a_b.reports");
            let relative = |path: &PathBuf| path.strip_prefix(&root).unwrap().display().to_string();
            Ok(paths.iter().map(|path| format!("{}={}", relative(path), fs::read_to_string(path).unwrap())).collect())
        }

        fn files(&self, kind: &str) -> usize {
            fs::read_dir(self.folder.reports_directory("a/b").join(kind)).unwrap().count()
        }
    }

    /// U49: reports lie unpacked under the names that they have in GitLab's archive
    #[test]
    fn reports_have_the_names_of_gitlabs_archive() {
        let scene = Scene::new(Limits::default());
        assert_eq!(scene.store("junit", "junit.xml.gz", &gzip(b"<a/>")).unwrap(), ["junit/junit.xml=<a/>"]);
        assert_eq!(scene.store("dotenv", ".env.gz", &gzip(b"A=1")).unwrap(), ["dotenv/.env=A=1"]);
        let several = [gzip(b"1"), gzip(b"2"), gzip(b"")].concat();
        assert_eq!(
            scene.store("cobertura", "cobertura-coverage.xml.gz", &several).unwrap(),
            [
                "cobertura/cobertura-coverage.xml=1",
                "cobertura/cobertura-coverage-2.xml=2",
                "cobertura/cobertura-coverage-3.xml="
            ]
        );
        assert_eq!(
            scene.store("sast", "gl-sast-report.json", b"{}").unwrap(),
            ["sast/gl-sast-report.json={}"],
            "raw reports are as they came"
        );
        assert_eq!(scene.store("metrics", "m.gz", b"plain").unwrap(), ["metrics/m.gz=plain"]);
    }

    #[test]
    fn names_of_the_guests_stay_in_the_folder() {
        let scene = Scene::new(Limits::default());
        let stored = scene.store("../x", "../../junit.xml.gz", &gzip(b"x")).unwrap();
        assert_eq!(stored, ["_.._x/_.._.._junit.xml=x"]);
        assert_eq!(scene.store("junit", ".git.gz", &gzip(b"x")).unwrap(), ["junit/_.git=x"]);
        assert_eq!(scene.store("junit", ".env.gz", &gzip(b"x")).unwrap(), ["junit/_.env=x"]);
    }

    /// U30: what a packed report makes is bounded, and nothing of one that is too large stays
    #[test]
    fn packed_reports_are_unpacked_within_limits() {
        let scene = Scene::new(Limits { bytes: 1000, ..Limits::default() });
        let message = |what: &str| format!("the archive is refused: `r.gz` and those before it make more than {what}");
        let text: Vec<u8> = (0..600_u32).map(|n| (n * n % 251).to_le_bytes()[0]).collect();
        let twice = [gzip(&text), gzip(&text)].concat();
        assert_eq!(scene.store("junit", "r.gz", &twice).unwrap_err(), message("1000 bytes"));
        assert_eq!(scene.files("junit"), 0);
        assert_eq!(
            scene.store("sast", "r", &vec![b'x'; 1001]).unwrap_err(),
            message("1000 bytes").replace("r.gz", "r")
        );
        assert_eq!(scene.files("sast"), 0);
        let many = gzip(b"").repeat(MEMBERS_MAX + 1);
        assert_eq!(scene.store("junit", "r.gz", &many).unwrap_err(), message("1000 files"));
        assert_eq!(scene.files("junit"), 0);
        let ratio = Scene::new(Limits { ratio_free_bytes: 1000, ..Limits::default() });
        let bomb = gzip(&vec![0; 4 << 20]);
        assert_eq!(ratio.store("junit", "r.gz", &bomb).unwrap_err(), message("200 bytes of each byte packed"));
        let mut damaged = gzip(b"some text");
        damaged[12] ^= 0xff;
        assert!(ratio.store("junit", "r.gz", &damaged).unwrap_err().contains("its data is broken"));
        let behind = [gzip(b"x"), b"more".to_vec()].concat();
        assert!(ratio.store("junit", "r.gz", &behind).unwrap_err().contains("has something behind its end"));
        assert_eq!(ratio.files("junit"), 0);
    }
}
