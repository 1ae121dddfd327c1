//! The dotenv report: its lines become variables.

use std::io::Read as _;

/// Largest report, unpacked. GitLab's default.
const BYTES_MAX: u64 = 5 * 1024;

/// Most variables in one report. GitLab's default for the largest plan.
const VARIABLES_MAX: usize = 150;

/// Unpacks and reads a report; the error is GitLab's message.
pub(super) fn parse(gzip: &[u8]) -> Result<Vec<(String, String)>, String> {
    let mut text = Vec::new();
    let mut unpacked = flate2::read::MultiGzDecoder::new(gzip).take(BYTES_MAX + 1);
    if unpacked.read_to_end(&mut text).is_err() {
        return Err("Invalid Format".into());
    }
    if text.len() > usize::try_from(BYTES_MAX).unwrap_or(usize::MAX) {
        return Err(format!("Dotenv Artifact Too Big. Maximum Allowable Size: {BYTES_MAX}"));
    }
    let text = String::from_utf8(text).map_err(|_| "Invalid Format".to_owned())?;
    let mut variables: Vec<(String, String)> = Vec::new();
    for line in text.lines() {
        let (key, value) = line.split_once('=').ok_or("Invalid Format")?;
        let (key, value) = (key.trim(), value.trim());
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            return Err("Validation failed: Key can contain only letters, digits and '_'.".into());
        }
        match variables.iter_mut().find(|(known, _)| known == key) {
            Some((_, known)) => *known = value.to_owned(),
            None => variables.push((key.to_owned(), value.to_owned())),
        }
    }
    if variables.len() > VARIABLES_MAX {
        return Err(format!("Dotenv files cannot have more than {VARIABLES_MAX} variables"));
    }
    Ok(variables)
}
