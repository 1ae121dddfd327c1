//! `#[cfg(…)]`: is what follows part of a test build on the hosts that the rings run on?

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// Whether the predicate holds; one that is not known here does not.
pub(crate) fn holds(predicate: TokenStream) -> bool {
    let tokens: Vec<TokenTree> = predicate.into_iter().collect();
    match &tokens[..] {
        [TokenTree::Ident(name), TokenTree::Group(group)] if group.delimiter() == Delimiter::Parenthesis => {
            let mut parts = parts(group.stream()).into_iter();
            match name.to_string().as_str() {
                "all" => parts.all(holds),
                "any" => parts.any(holds),
                // Of what is not known, neither it nor its opposite holds.
                "not" => parts.next().is_some_and(|part| known(part.clone()) && !holds(part)),
                _ => false,
            }
        }
        _ => is_true(&tokens),
    }
}

const TRUE: &[&str] = &["test", "unix", "debug_assertions", "target_os=\"linux\"", "target_endian=\"little\""];

fn is_true(tokens: &[TokenTree]) -> bool {
    let text: String = tokens.iter().map(ToString::to_string).collect();
    TRUE.contains(&text.as_str())
}

fn known(predicate: TokenStream) -> bool {
    let tokens: Vec<TokenTree> = predicate.into_iter().collect();
    match &tokens[..] {
        [TokenTree::Ident(_), TokenTree::Group(group)] => parts(group.stream()).into_iter().all(known),
        _ => is_true(&tokens),
    }
}

/// Parts between commas.
fn parts(stream: TokenStream) -> Vec<TokenStream> {
    let mut parts = vec![TokenStream::new()];
    for token in stream {
        match (&token, parts.last_mut()) {
            (TokenTree::Punct(punct), _) if punct.as_char() == ',' => parts.push(TokenStream::new()),
            (_, Some(part)) => part.extend([token]),
            (_, None) => {}
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_what_a_test_build_on_linux_has_holds() {
        for (predicate, expected) in [
            ("test", true),
            ("any(test, feature = \"other\")", true),
            ("all(test, unix)", true),
            ("not(windows)", false),
            ("not(test)", false),
            ("not(any(test, unix))", false),
            ("any()", false),
            ("feature = \"other\"", false),
            ("all(test, feature = \"other\")", false),
        ] {
            assert_eq!(super::holds(predicate.parse().expect("tokens")), expected, "{predicate}");
        }
    }
}
