//! `dayfly-egress`: see the library.

fn main() -> std::process::ExitCode {
    dayfly_egress::run()
}
