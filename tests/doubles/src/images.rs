//! One image, on no disk: the fake hypervisor reads none.

use dayfly::BoxFuture;
use dayfly::image::manifest::{BootKind, BuildInputs, ExecutorKind, ImageFile, ImageRunner, Manifest, RunnerOrigin};
use dayfly::image::stamp::Stamp;
use dayfly::image::store::{Image, ImageError, Images};
use dayfly::machine_spec::ImageRef;
use dayfly::vm::Boot;
use dayfly_guest_config::WIRE_CONTRACT;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The image `test`, boot-tested, with an official runner.
#[must_use]
pub fn image() -> Image {
    let file = |name: &str| ImageFile { file: name.into(), bytes: 1, sha256: String::new() };
    Image {
        name: "test".into(),
        dir: "/images/test".into(),
        disk: "/images/test/disk.qcow2".into(),
        disk_bytes: 1 << 30,
        boot: Boot::Disk,
        manifest: Manifest {
            format_version: 1,
            name: "test".into(),
            architecture: "x86_64".into(),
            boot: BootKind::Disk,
            cmdline: None,
            contract: dayfly_guest_config::CONTRACT,
            executor: ExecutorKind::Shell,
            networks: vec!["relay".into()],
            abilities: vec!["stay".into(), "shell".into(), "clone".into(), "hold".into()],
            info: Some(r#"{"name":"gitlab-runner","version":"19.3.0","features":{"cancel_gracefully":true}}"#.into()),
            runner: ImageRunner {
                version: "19.3.0".into(),
                revision: None,
                origin: RunnerOrigin::Path,
                sha256: String::new(),
            },
            disk: file("disk.qcow2"),
            kernel: None,
            initrd: None,
            docker: None,
            build: BuildInputs::default(),
        },
        stamp: Stamp::default(),
    }
}

/// The same, built before doors were wires.
#[must_use]
pub fn image_of_before() -> Image {
    let mut image = image();
    image.manifest.contract = WIRE_CONTRACT - 1;
    image.manifest.networks.clear();
    image.manifest.abilities.clear();
    image
}

/// A store that holds one image and nothing else. Clones share it.
#[derive(Clone, Debug)]
pub struct OneImage {
    image: Image,
    missing: Arc<AtomicBool>,
}

impl OneImage {
    /// This image.
    #[must_use]
    pub fn new(image: Image) -> Self {
        Self { image, missing: Arc::default() }
    }

    /// Somebody takes it away, or brings it back.
    pub fn set_missing(&self, missing: bool) {
        self.missing.store(missing, Ordering::Relaxed);
    }

    fn get(&self, name: &str) -> Result<Image, ImageError> {
        if self.image.name == name && !self.missing.load(Ordering::Relaxed) {
            Ok(self.image.clone())
        } else {
            Err(ImageError::Missing { name: name.to_owned(), directory: self.image.dir.clone() })
        }
    }
}

/// The image, if it is this version of it.
fn of_version(image: Image, wanted: &ImageRef) -> Result<Image, ImageError> {
    if image.digest() == wanted.digest {
        return Ok(image);
    }
    Err(ImageError::Replaced { name: wanted.name.clone(), digest: wanted.digest.clone() })
}

impl Images for OneImage {
    fn load<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Image, ImageError>> {
        Box::pin(std::future::ready(self.get(name)))
    }

    fn load_version<'a>(&'a self, wanted: &'a ImageRef) -> BoxFuture<'a, Result<Image, ImageError>> {
        Box::pin(std::future::ready(self.get(&wanted.name).and_then(|image| of_version(image, wanted))))
    }
}

/// A store that holds these images. Clones share it.
#[derive(Clone, Debug)]
pub struct TheseImages(Arc<Mutex<Shelf>>);

#[derive(Debug)]
struct Shelf {
    images: BTreeMap<String, Image>,
    /// Once it was looked for so many times more, it is gone.
    forget: Option<(u32, String)>,
}

impl TheseImages {
    /// These images, each by its name.
    #[must_use]
    pub fn new(images: Vec<Image>) -> Self {
        let images = images.into_iter().map(|image| (image.name.clone(), image)).collect();
        Self(Arc::new(Mutex::new(Shelf { images, forget: None })))
    }

    /// Puts an image there, or another one in its place.
    pub fn put(&self, image: Image) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).images.insert(image.name.clone(), image);
    }

    /// Somebody takes it away, once it was looked for so many times more.
    pub fn forget_after(&self, looks: u32, name: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).forget = Some((looks, name.to_owned()));
    }

    fn get(&self, name: &str) -> Result<Image, ImageError> {
        let mut shelf = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((looks, gone)) = shelf.forget.take() {
            match looks.checked_sub(u32::from(gone == name)) {
                Some(left) => shelf.forget = Some((left, gone)),
                None => drop(shelf.images.remove(&gone)),
            }
        }
        let missing = || ImageError::Missing { name: name.to_owned(), directory: "/images".into() };
        shelf.images.get(name).cloned().ok_or_else(missing)
    }
}

impl Images for TheseImages {
    fn load<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Image, ImageError>> {
        Box::pin(std::future::ready(self.get(name)))
    }

    fn load_version<'a>(&'a self, wanted: &'a ImageRef) -> BoxFuture<'a, Result<Image, ImageError>> {
        Box::pin(std::future::ready(self.get(&wanted.name).and_then(|image| of_version(image, wanted))))
    }
}
