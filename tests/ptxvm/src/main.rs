//! Temporary main.
fn main() {
    for f in std::env::args().skip(1) {
        let t = std::fs::read_to_string(&f).unwrap();
        match ptxvm::Module::parse(&t) { Ok(m) => println!("{f}: {:?}", m.entries()), Err(e) => println!("{f}: {e}") }
    }
}
