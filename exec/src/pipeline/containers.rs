//! What a job says of its containers: `image` and `services`.

use super::error::Fault;
use super::model::{Image, Service};
use super::node::Node;
use std::rc::Rc;

/// A name, or a mapping that has one.
pub(super) fn image(node: &Node) -> Result<Image, Fault> {
    if let Ok(name) = node.text() {
        return Ok(Image { name: name.to_owned(), entrypoint: Vec::new() });
    }
    let known = ["name", "entrypoint", "docker", "kubernetes", "pull_policy"];
    if let Some(other) = node.mapping()?.iter().find(|e| !known.contains(&e.key.as_str())) {
        return Err(Fault::at(other.line, "is no key of `image`; correct or remove it").under(&other.key));
    }
    let Some(name) = node.get("name") else { return Err(Fault::at(node.line, "has no `name`")) };
    let entrypoint = match node.get("entrypoint") {
        Some(entry) => entry.value.texts().map_err(|f| f.under("entrypoint"))?,
        None => Vec::new(),
    };
    Ok(Image { name: name.value.text().map_err(|f| f.under("name"))?.to_owned(), entrypoint })
}

/// Each a name, or a mapping that has one.
pub(super) fn services(node: &Node) -> Result<Vec<Service>, Fault> {
    let one = |node: &Rc<Node>| {
        if let Ok(name) = node.text() {
            return Ok(Service { name: name.to_owned(), ..Service::default() });
        }
        let known = ["name", "alias", "entrypoint", "command", "variables", "docker", "kubernetes", "pull_policy"];
        if let Some(other) = node.mapping()?.iter().find(|e| !known.contains(&e.key.as_str())) {
            return Err(Fault::at(other.line, "is no key of a service; correct or remove it").under(&other.key));
        }
        let texts = |key: &str| match node.get(key) {
            Some(entry) => entry.value.text_or_texts().map_err(|f| f.under(key)),
            None => Ok(Vec::new()),
        };
        let Some(name) = node.get("name") else { return Err(Fault::at(node.line, "has a service without `name`")) };
        let alias = node.get("alias").map(|entry| entry.value.text().map_err(|f| f.under("alias"))).transpose()?;
        let variables = match node.get("variables") {
            Some(entry) => entry.value.mapping().map_err(|f| f.under("variables"))?,
            None => &[],
        };
        let variables =
            variables.iter().map(|e| Ok((e.key.clone(), e.value.scalar().map_err(|f| f.under(&e.key))?.to_owned())));
        Ok(Service {
            name: name.value.text().map_err(|f| f.under("name"))?.to_owned(),
            alias: alias.map(str::to_owned),
            entrypoint: texts("entrypoint")?,
            command: texts("command")?,
            variables: variables.collect::<Result<_, Fault>>()?,
        })
    };
    node.sequence()?.iter().map(one).collect()
}
