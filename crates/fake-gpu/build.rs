//! Compiles the fake driver with the fake NCCL, and the kernels' CUDA sources as C++ for the host: two libraries, which `src` has within it.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let cuda = here.join("../kernels/cuda");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-changed={}", cuda.display());

    let files = ["driver.cpp", "nccl.cpp", "host.cpp", "broken.cu"];
    let mut sources: Vec<_> = files.map(|file| here.join("cpp").join(file)).into();
    let is_driver = |source: &Path| source.ends_with("driver.cpp") || source.ends_with("nccl.cpp");
    let listed = std::fs::read_dir(&cuda).expect("the kernels' sources are beside this crate");
    let mut kernels: Vec<_> = listed.map(|entry| entry.expect("a listed file").path()).collect();
    kernels.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    kernels.sort();
    sources.extend(kernels);

    let compiler = Compiler { driver: driver_compiler(), kernels: kernel_compiler(&here, &cuda) };
    let objects: Vec<PathBuf> = std::thread::scope(|scope| {
        let compile = |source: &Path| {
            let object = out.join(source.file_name().expect("a file")).with_extension("o");
            let tool = if is_driver(source) { &compiler.driver } else { &compiler.kernels };
            let is_cuda = source.extension().is_some_and(|extension| extension == "cu");
            let mut command = tool.to_command();
            command.arg("-c").args(if is_cuda { &["-x", "c++"][..] } else { &[] });
            run(command.arg(source).arg("-o").arg(&object));
            object
        };
        let threads: Vec<_> = sources.iter().map(|source| scope.spawn(move || compile(source))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a compiler's message is above")).collect()
    });
    let link = |objects: &[PathBuf], library: &str| {
        run(compiler.driver.to_command().arg("-shared").args(objects).arg("-o").arg(out.join(library)));
    };
    link(&objects[..2], "driver.so");
    link(&objects[2..], "kernels.so");
}

struct Compiler {
    driver: cc::Tool,
    kernels: cc::Tool,
}

fn build() -> cc::Build {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .pic(true)
        .opt_level(1)
        .debug(false)
        .warnings(false)
        .flag("-Wall")
        .flag("-Werror");
    build
}

/// Without unique symbols: each copy of the library has its own state.
fn driver_compiler() -> cc::Tool {
    build().flag("-Wextra").flag_if_supported("-fno-gnu-unique").get_compiler()
}

/// Fuses nothing by itself, as NVRTC is told.
fn kernel_compiler(here: &Path, cuda: &Path) -> cc::Tool {
    let mut build = build();
    build.flag("-ffp-contract=off").flag("-fno-strict-aliasing").flag("-U_FORTIFY_SOURCE");
    build
        .flag("-include")
        .flag(here.join("cpp/host.h"))
        .include(cuda)
        .include(here.join("cpp"))
        .get_compiler()
}

fn run(command: &mut Command) {
    let status = command.status();
    let succeeded = status.as_ref().is_ok_and(|status| status.success());
    assert!(succeeded, "{command:?}: {status:?}; a C++ compiler is needed: install g++ or clang++");
}
