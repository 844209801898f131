//! The `tilert-mk` binary. Everything is in the library's `cli`.

fn main() -> std::process::ExitCode {
    tilert_mk::cli::run()
}
