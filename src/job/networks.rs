//! What network do a class's jobs have in an image? What the class says, and what the image's guest program knows.

use crate::config::Class;
use crate::image::store::{Image, ImageError};
use crate::network::{Choice, Mode};

/// The network of a class's jobs in this image: what the class says, else the best that the image's guest program knows.
///
/// # Errors
/// [`ImageError::NoRelay`]: the class wants what the image does not know.
pub fn network_of(class: &Class, image: &Image) -> Result<Mode, ImageError> {
    match (class.network, image.manifest.can_relay()) {
        (Some(Choice::User), _) | (None, false) => Ok(Mode::User),
        (Some(Choice::Relay) | None, true) => Ok(Mode::Relay),
        // `bridge` is refused where configurations are read.
        (Some(Choice::Relay | Choice::Bridge), _) => {
            Err(ImageError::NoRelay { name: image.name.clone(), class: class.name.clone() })
        }
    }
}

/// Why this class's jobs have a network that keeps them from less than they could have, in words for operators; `None`:
/// they do not, or somebody wants it so.
#[must_use]
pub fn weaker_network(class: &Class, image: &Image) -> Option<String> {
    (class.network.is_none() && network_of(class, image).is_ok_and(|network| network == Mode::User)).then(|| {
        format!(
            "image `{0}` was built before jobs could do without a network card: jobs of class `{1}` have the network `user`, in which they reach what listens on this host; rebuild it with `dayfly image build {0}`",
            image.name, class.name
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::manifest::tests::example;

    /// A class that says nothing gets the best that its image can, and one that says `relay` nothing less.
    #[test]
    fn the_network_is_the_best_that_class_and_image_agree_on() {
        let of = |choice: Option<Choice>, relays: bool| {
            let class = Class { network: choice, ..Class::new("c", "i") };
            let mut manifest = example();
            if !relays {
                manifest.networks.clear();
            }
            let image = Image::example(manifest);
            (network_of(&class, &image).map_err(|error| error.to_string()), weaker_network(&class, &image).is_some())
        };
        assert_eq!(of(None, true), (Ok(Mode::Relay), false));
        assert_eq!(of(None, false), (Ok(Mode::User), true));
        assert_eq!(of(Some(Choice::Relay), true), (Ok(Mode::Relay), false));
        for relays in [true, false] {
            assert_eq!(of(Some(Choice::User), relays), (Ok(Mode::User), false), "somebody wants it so");
        }
        let (refused, _) = of(Some(Choice::Relay), false);
        assert!(refused.unwrap_err().ends_with("rebuild it with `dayfly image build debian-12-shell`"));
    }
}
