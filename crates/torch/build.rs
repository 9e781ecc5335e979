//! Compiles the C++ shim against libtorch and tells dependents where libtorch's libraries are.
//!
//! Dependents that link a binary, a test or an example pass the folder on as an rpath (see their build scripts), so
//! that it runs without any environment variable.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=shim");
    let libtorch = std::env::var("LIBTORCH").expect(
        "`LIBTORCH` is not set: run `make setup`, which fetches libtorch and tells cargo where it is",
    );
    let libtorch = PathBuf::from(libtorch);
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .files(["shim/autograd.cpp", "shim/allocator.cpp", "shim/cuda.cpp"])
        // libtorch's headers are not ours to warn about.
        .flag(format!("-isystem{}", libtorch.join("include").display()))
        .flag_if_supported("-Wno-unused-parameter")
        .compile("shardwise_torch_shim");
    let lib = libtorch.join("lib");
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    println!("cargo:libtorch_lib={}", lib.display());
}
