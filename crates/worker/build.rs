//! Lets tests and examples find libtorch without any environment variable.

fn main() {
    let lib =
        std::env::var("DEP_SHARDWISE_TORCH_LIBTORCH_LIB").expect("shardwise-torch says where libtorch is");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}
