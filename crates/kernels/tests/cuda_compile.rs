//! The kernels compile for every GPU that is supported, on a machine without any; and compiled code is kept, but not
//! believed blindly.

#![allow(clippy::unwrap_used)] // a failed test may panic anywhere

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use shardwise_fake_gpu::FakeGpu;
use shardwise_kernels::cuda::{
    Arch, CompiledCode, CudaKernelError, Header, KernelCache, Nvrtc, Origin, Program, Search, Source,
    entry_points,
};
use shardwise_kernels::processor::MachineCode;

/// T4, A100, 3090, 4090 and L40, H100.
const ARCHS: [Arch; 5] =
    [Arch::new(7, 5), Arch::new(8, 0), Arch::new(8, 6), Arch::new(8, 9), Arch::new(9, 0)];

/// NVRTC where `SHARDWISE_NVRTC` says, beside libtorch, or where `scripts/setup_nvrtc.sh` puts it. A machine without it fails.
fn nvrtc() -> &'static Arc<Nvrtc> {
    static NVRTC: OnceLock<Arc<Nvrtc>> = OnceLock::new();
    NVRTC.get_or_init(|| {
        let variable = |name| std::env::var_os(name).map(PathBuf::from);
        let beside_libtorch = variable("LIBTORCH");
        let lib = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/lib");
        let pythons = fs::read_dir(lib).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
        let in_venv = pythons.map(|python| python.join("site-packages/torch"));
        let mut problem = None;
        for libtorch in beside_libtorch.into_iter().chain(in_venv).map(Some).chain([None]) {
            match Nvrtc::load(&Search { given: variable("SHARDWISE_NVRTC"), libtorch }) {
                Ok(nvrtc) => return Arc::new(nvrtc),
                Err(error) => problem = problem.or(Some(error)),
            }
        }
        panic!("{}", problem.expect("at least one place was tried"));
    })
}

#[test]
fn every_kernel_compiles_for_every_architecture_without_a_warning() {
    let work: Vec<(Source, Arch)> =
        Source::ALL.into_iter().flat_map(|source| ARCHS.map(|arch| (source, arch))).collect();
    let next = AtomicUsize::new(0);
    let nvrtc = nvrtc();
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while let Some(&(source, arch)) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let program = source.program();
                    let compiled = nvrtc.compile(&program, arch).unwrap_or_else(|error| panic!("{error}"));
                    assert_eq!(compiled.log, "", "{} for {arch}", program.name);
                    let found = entry_points(&compiled.cubin).unwrap();
                    let expected: BTreeSet<&str> = source.entries().collect();
                    assert_eq!(found.iter().map(String::as_str).collect::<BTreeSet<_>>(), expected);
                    assert_eq!(found.len(), source.entries().count(), "no name twice");
                    // ELF flags of machine code: the architecture is there in one of two bytes, by the file's version.
                    let flags = u32::from_le_bytes(compiled.cubin[0x30..0x34].try_into().unwrap());
                    let number: u32 = arch.to_string()["sm_".len()..].parse().unwrap();
                    assert!([flags & 0xff, flags >> 8 & 0xff].contains(&number), "{flags:#x} for {arch}");
                }
            });
        }
    });
}

const SMALL: Program<'static> = Program {
    name: "small.cu",
    text: "#include \"one.cuh\"\nextern \"C\" __global__ void small(int* x) { *x = ONE; }\n",
    headers: &[Header { name: "one.cuh", text: "#define ONE 1\n" }],
    entries: &[&["small"]],
};

#[test]
fn errors_name_the_source_and_the_line() {
    let wrong =
        Program { text: "// line 1\n// line 2\nextern \"C\" __global__ void small() { none(); }\n", ..SMALL };
    let error = nvrtc().compile(&wrong, ARCHS[0]).unwrap_err();
    assert!(matches!(error, CudaKernelError::Compile { .. }));
    let text = error.to_string();
    assert!(text.starts_with("compiling `small.cu` for `sm_75` failed\n"), "{text}");
    assert!(text.contains("small.cu(3): error: identifier \"none\" is undefined"), "{text}");

    let in_header = Program { headers: &[Header { name: "one.cuh", text: "\nint x = y;\n" }], ..SMALL };
    let text = nvrtc().compile(&in_header, ARCHS[0]).unwrap_err().to_string();
    assert!(text.contains("one.cuh(2): error"), "{text}");
}

#[test]
fn what_should_come_out_and_does_not_is_an_error() {
    let error =
        nvrtc().compile(&Program { entries: &[&["small"], &["large"]], ..SMALL }, ARCHS[0]).unwrap_err();
    assert_eq!(error.to_string(), "the machine code of `small.cu` has no kernel `large`");
    // CUDA 13 has dropped it.
    let error = nvrtc().compile(&SMALL, Arch::new(7, 0)).unwrap_err().to_string();
    assert!(error.contains("`sm_90`") && error.ends_with("not for `sm_70`"), "{error}");
    let error = nvrtc().compile(&Program { text: "a\0b", ..SMALL }, ARCHS[0]).unwrap_err().to_string();
    assert_eq!(error, "`small.cu` holds a zero byte, which NVRTC would take for its end");
}

#[test]
fn warnings_are_in_the_log() {
    let text = "#include \"one.cuh\"\nextern \"C\" __global__ void small(int* x) { int unused; *x = ONE; }\n";
    let compiled = nvrtc().compile(&Program { text, ..SMALL }, ARCHS[0]).unwrap();
    assert!(compiled.log.contains("small.cu(2): warning"), "{}", compiled.log);
}

#[test]
fn machine_code_is_kept_and_damaged_code_is_compiled_again() {
    let folder = tempfile::tempdir().unwrap();
    let cache = KernelCache::open(&folder.path().join("kernels")).unwrap();
    let files = || -> Vec<PathBuf> {
        let entries = fs::read_dir(folder.path().join("kernels")).unwrap();
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    };
    let get = |program: &Program<'_>, arch| cache.cubin(nvrtc(), program, arch).unwrap();

    let first = get(&SMALL, ARCHS[0]);
    assert!(matches!(first.origin, Origin::Compiled));
    let second = get(&SMALL, ARCHS[0]);
    assert!(matches!(second.origin, Origin::Cached));
    assert_eq!(first.code, second.code);
    assert_eq!(files().len(), 1);
    let name = files()[0].file_name().unwrap().to_string_lossy().into_owned();
    assert!(name.starts_with("small-sm_75-") && name.ends_with(".cubin"), "{name}");

    // Another architecture, another header: other files.
    assert!(matches!(get(&SMALL, ARCHS[4]).origin, Origin::Compiled));
    let other = Program { headers: &[Header { name: "one.cuh", text: "#define ONE 2\n" }], ..SMALL };
    assert!(matches!(get(&other, ARCHS[0]).origin, Origin::Compiled));
    assert_eq!(files().len(), 3);

    // Damage in the middle, an end that is missing, another program's code under this name: compiled again, and whole afterwards.
    let path = folder.path().join("kernels").join(&name);
    let whole = fs::read(&path).unwrap();
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 1;
    let foreign = fs::read(files().into_iter().find(|other| *other != path).unwrap()).unwrap();
    for bytes in [damaged, whole[..whole.len() - 5].to_vec(), Vec::new(), foreign] {
        fs::write(&path, bytes).unwrap();
        let again = get(&SMALL, ARCHS[0]);
        assert!(matches!(again.origin, Origin::Compiled));
        assert_eq!(again.code, first.code);
        assert_eq!(fs::read(&path).unwrap(), whole);
    }

    // Without its folder the code still comes, and the caller learns that it was not kept.
    fs::remove_dir_all(folder.path().join("kernels")).unwrap();
    assert!(matches!(get(&SMALL, ARCHS[0]).origin, Origin::NotKept(_)));
}

#[test]
fn a_processor_gets_the_code_of_its_gpus_architecture() {
    let fake = FakeGpu::lazy();
    fake.set_device(0, "Fake T4", (7, 5), 16 << 30);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kernels");
    let cache = KernelCache::open(&path).unwrap();
    let code = CompiledCode::for_gpu(Arc::clone(nvrtc()), cache.clone(), &fake.gpu()).unwrap();
    assert_eq!(code.arch(), Arch::new(7, 5));
    let cubin = code.of(Source::Swiglu).unwrap();
    assert_eq!(cubin, nvrtc().compile(&Source::Swiglu.program(), Arch::new(7, 5)).unwrap().cubin);
    let kept = fs::read_dir(&path).unwrap().next().unwrap().unwrap().file_name();
    assert!(kept.to_string_lossy().starts_with("swiglu-sm_75-"), "{kept:?}");
    assert!(code.take_not_kept().is_none());

    // A folder that is gone is no failure, but is told.
    fs::remove_dir_all(&path).unwrap();
    assert_eq!(code.of(Source::Swiglu).unwrap(), cubin);
    assert!(code.take_not_kept().is_some());
    assert!(code.take_not_kept().is_none(), "once");

    let error = CompiledCode::new(Arc::clone(nvrtc()), cache, Arch::new(7, 0)).unwrap_err();
    assert!(matches!(error, CudaKernelError::UnsupportedArch { .. }), "{error}");
}

#[test]
fn without_a_library_the_error_says_where_it_was_looked_for_and_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let given = folder.path().join("nowhere");
    let error = Nvrtc::load(&Search { given: Some(given.clone()), libtorch: None }).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "no usable NVRTC, which compiles the CUDA kernels; `{}`: no such file or folder; install the package \
             `nvidia-cuda-nvrtc` 13.0 beside libtorch (`scripts/setup_nvrtc.sh` does), or name the folder that holds \
             `libnvrtc.so.13` in `SHARDWISE_NVRTC`",
            given.display()
        )
    );
    // A file that is no library, in a folder that looks right.
    for name in ["libnvrtc.so.13", "libnvrtc-builtins.so.13.0"] {
        fs::write(folder.path().join(name), "no library").unwrap();
    }
    let error = Nvrtc::load(&Search { given: Some(folder.path().into()), libtorch: None }).unwrap_err();
    let CudaKernelError::NotFound { tried } = error else { panic!("{error}") };
    assert_eq!(tried.len(), 1);
    assert!(tried[0].problem.contains("libnvrtc-builtins.so.13.0"), "{}", tried[0]);
    // A library, but not this one.
    let libc = Search { given: Some("/lib/x86_64-linux-gnu/libc.so.6".into()), libtorch: None };
    assert!(Nvrtc::load(&libc).unwrap_err().to_string().contains("libc.so.6"));
}

#[test]
fn the_library_is_known_by_version_and_place() {
    let nvrtc = nvrtc();
    assert_eq!(nvrtc.version().major, 13);
    assert!(nvrtc.place().contains("libnvrtc"), "{}", nvrtc.place());
    assert!(ARCHS.iter().all(|arch| nvrtc.supported().contains(arch)));
}
