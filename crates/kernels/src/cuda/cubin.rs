//! Which kernels a piece of machine code holds.
//!
//! NVRTC's result is an ELF file of 64 bits, little endian; a kernel is a function of its symbol table that is marked
//! as an entry point. Nothing of the file is believed: every offset is checked.

use super::CudaKernelError;

/// ELF's symbol table among the types of sections.
const SYMBOL_TABLE: u32 = 2;
/// ELF's function among the types of symbols.
const FUNCTION: u8 = 2;
/// NVIDIA's mark of an entry point in a symbol's other flags.
const ENTRY_POINT: u8 = 0x10;

const SECTION_BYTES: usize = 64;
const SYMBOL_BYTES: usize = 24;

/// The names of all kernels in `cubin`, in the order of the file.
///
/// # Errors
/// [`CudaKernelError::NotCubin`].
pub fn entry_points(cubin: &[u8]) -> Result<Vec<String>, CudaKernelError> {
    entries(cubin).map_err(|problem| CudaKernelError::NotCubin { problem })
}

fn entries(file: &[u8]) -> Result<Vec<String>, &'static str> {
    if !file.starts_with(b"\x7fELF\x02\x01") {
        return Err("not an ELF file of 64 bits");
    }
    let sections = at(u64_at(file, 0x28)?)?;
    let num_sections = usize::from(u16_at(file, 0x3c)?);
    let section = |number: usize| {
        let start = number.checked_mul(SECTION_BYTES).and_then(|offset| offset.checked_add(sections));
        part(file, start.ok_or("a section lies outside of the file")?, SECTION_BYTES)
    };
    let contents = |section: &[u8]| part(file, at(u64_at(section, 0x18)?)?, at(u64_at(section, 0x20)?)?);
    let mut names = Vec::new();
    for number in 0..num_sections {
        let table = section(number)?;
        if u32_at(table, 0x04)? != SYMBOL_TABLE {
            continue;
        }
        let strings = contents(section(at(u32_at(table, 0x28)?.into())?)?)?;
        for symbol in contents(table)?.chunks_exact(SYMBOL_BYTES) {
            let (info, other) = (symbol[4], symbol[5]);
            if info & 0xf == FUNCTION && other & ENTRY_POINT != 0 {
                names.push(text_at(strings, at(u32_at(symbol, 0)?.into())?)?);
            }
        }
    }
    Ok(names)
}

fn at(offset: u64) -> Result<usize, &'static str> {
    usize::try_from(offset).map_err(|_| "an offset is too large")
}

fn part(bytes: &[u8], start: usize, numel: usize) -> Result<&[u8], &'static str> {
    let end = start.checked_add(numel).ok_or("a part lies outside of the file")?;
    bytes.get(start..end).ok_or("a part lies outside of the file")
}

fn array<const N: usize>(bytes: &[u8], start: usize) -> Result<[u8; N], &'static str> {
    part(bytes, start, N)?.try_into().map_err(|_| "a part lies outside of the file")
}

fn u16_at(bytes: &[u8], start: usize) -> Result<u16, &'static str> {
    array(bytes, start).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], start: usize) -> Result<u32, &'static str> {
    array(bytes, start).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], start: usize) -> Result<u64, &'static str> {
    array(bytes, start).map(u64::from_le_bytes)
}

fn text_at(strings: &[u8], start: usize) -> Result<String, &'static str> {
    let rest = strings.get(start..).ok_or("a name lies outside of the file")?;
    let end = rest.iter().position(|&byte| byte == 0).ok_or("a name has no end")?;
    String::from_utf8(rest[..end].to_vec()).map_err(|_| "a name is no text")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_elf_file_is_refused() {
        for bytes in [&b""[..], b"\x7fELF", b"\x7fELF\x01\x01", &[0; 100], b"\x7fELF\x02\x01"] {
            assert!(matches!(entry_points(bytes), Err(CudaKernelError::NotCubin { .. })));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_after_the_magic_are_taken_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let file = [b"\x7fELF\x02\x01", &bytes[..]].concat();
            let _ = entry_points(&file);
        }
    }
}
