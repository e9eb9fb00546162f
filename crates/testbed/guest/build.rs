//! Links the guest as a static program at a fixed place, without a C library or its start files.

fn main() {
    let dir = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR for build scripts");
    println!("cargo:rerun-if-changed=guest.ld");
    let script = format!("-Wl,-T{dir}/guest.ld");
    let others = [
        "-nostdlib",
        "-nostartfiles",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,--no-eh-frame-hdr",
    ];
    for arg in others.into_iter().chain([script.as_str()]) {
        println!("cargo:rustc-link-arg-bins={arg}");
    }
}
