//! No line of the product runs otherwise because a test wants it to: no feature for tests, no planted bug.
//!
//! What tests need stands in their own packages (decision D29). Named failpoints are the one exception: they branch
//! nowhere that a product's program can go (`src/failpoint.rs`).

use super::ROOT;
use std::path::Path;

/// Folders of the packages that the product is built from.
const PRODUCT: [&str; 5] =
    ["src", "egress/src", "vm-images/guest/src", "vm-images/guest-config/src", "vm-images/wire/src"];

/// Lines of this code, its own tests left out, that a switch for tests decides.
fn wrong_branches(code: &str) -> Vec<&str> {
    let code = code.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    code.lines().filter(|line| is_wrong(line)).collect()
}

fn is_wrong(line: &str) -> bool {
    let line: String = line.chars().filter(|c| !c.is_whitespace()).collect();
    // `#[cfg(test)]` alone is a test's own code, which no program has.
    let by_feature = line.starts_with("feature=\"") || line.contains("cfg") && line.contains("feature=\"");
    let mixed = line.contains("cfg(any(test") || line.contains("cfg(not(test") || line.contains("cfg!(test");
    by_feature || mixed || line.contains("cfg(fuzzing") || line.contains("planted::")
}

#[test]
fn nothing_in_the_product_branches_for_a_test() {
    let mut found = Vec::new();
    let mut files = 0;
    for folder in PRODUCT {
        for (path, code) in super::sources(&Path::new(ROOT).join(folder)) {
            files += 1;
            found.extend(wrong_branches(&code).iter().map(|line| format!("{}: {}", path.display(), line.trim())));
        }
    }
    println!("figure product.wrong_branches {}", found.len());
    assert!(found.is_empty(), "{found:#?}");
    assert!(files > 150, "{files} files: are they elsewhere now?");
}

#[test]
fn a_planted_branch_is_found() {
    let planted = r#"
        #[cfg(feature = "test-util")]
        let a = if planted::on(Bug::RetryStorm) { 1 } else { 2 };
        if cfg!(feature = "x") && b { return; }
        #[cfg(any(test, feature = "y"))]
        #[cfg(not(test))]
        #[cfg_attr(feature = "z", derive(Debug))]
        if cfg!(test) { return; }
    "#;
    assert_eq!(wrong_branches(planted).len(), 7);
    let fine = r#"
        #[cfg(test)]
        mod damage;
        reached(Point::K4);
        let feature = "a feature of the payload";
        #[cfg(unix)]
        #[cfg(test)]
mod tests {
    if cfg!(feature = "x") {}
}"#;
    assert!(wrong_branches(fine).is_empty(), "{:?}", wrong_branches(fine));
}
