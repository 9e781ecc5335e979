//! Whether bytes are a whole CUBIN.
//!
//! A driver is given a pointer and no length, so a file that was cut short would make it read past the end. A CUBIN
//! is a 64-bit ELF file; its headers say where everything ends.

/// The machine number of CUDA in ELF.
const CUDA: u16 = 190;
const HEADER_BYTES: usize = 64;
const SECTION_HEADER_BYTES: usize = 64;
/// A section that takes no room in the file, like zeroed memory.
const NO_BITS: u32 = 8;

/// Checks that the file has everything its headers speak of.
pub(super) fn require_whole(image: &[u8]) -> Result<(), &'static str> {
    if image.len() < HEADER_BYTES {
        return Err("it is shorter than an ELF header");
    }
    if !image.starts_with(b"\x7fELF\x02\x01") {
        return Err("it is no 64-bit little-endian ELF file");
    }
    if u16_at(image, 18) != Some(CUDA) {
        return Err("it is compiled for another machine than a GPU of NVIDIA");
    }
    let cut = "it was cut short";
    let inside = |start: u64, size: u64| start.checked_add(size).is_some_and(|end| end <= image.len() as u64);
    let table = |offset, size, number| {
        let (start, size) = (u64_at(image, offset)?, u16_at(image, size)?);
        let number = u16_at(image, number)?;
        Some((start, u64::from(size), u64::from(number)))
    };
    let (start, size, number) = table(32, 54, 56).ok_or(cut)?;
    if !inside(start, size * number) {
        return Err(cut);
    }
    let (start, size, number) = table(40, 58, 60).ok_or(cut)?;
    if !inside(start, size * number) || (number > 0 && size < SECTION_HEADER_BYTES as u64) {
        return Err(cut);
    }
    for section in 0..number {
        let at = usize::try_from(start + section * size).map_err(|_| cut)?;
        let header = image.get(at..at + SECTION_HEADER_BYTES).ok_or(cut)?;
        let kind = u32_at(header, 4).ok_or(cut)?;
        let (offset, bytes) = (u64_at(header, 24).ok_or(cut)?, u64_at(header, 32).ok_or(cut)?);
        if kind != NO_BITS && !inside(offset, bytes) {
            return Err(cut);
        }
    }
    Ok(())
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file of CUDA with one section of ten bytes.
    fn image() -> Vec<u8> {
        let mut image = vec![0; HEADER_BYTES + SECTION_HEADER_BYTES + 10];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        image[18..20].copy_from_slice(&CUDA.to_le_bytes());
        image[40..48].copy_from_slice(&64u64.to_le_bytes());
        image[58..60].copy_from_slice(&64u16.to_le_bytes());
        image[60..62].copy_from_slice(&1u16.to_le_bytes());
        image[64 + 4] = 1;
        image[64 + 24..64 + 32].copy_from_slice(&128u64.to_le_bytes());
        image[64 + 32..64 + 40].copy_from_slice(&10u64.to_le_bytes());
        image
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let image = image();
        assert_eq!(require_whole(&image), Ok(()));
        for length in 0..image.len() {
            assert!(require_whole(&image[..length]).is_err(), "cut to {length} bytes");
        }
    }

    #[test]
    fn other_files_and_absurd_headers_are_refused() {
        let mut other = image();
        other[18] = 62;
        assert_eq!(require_whole(&other), Err("it is compiled for another machine than a GPU of NVIDIA"));
        assert_eq!(require_whole(&[b'/'; 100]), Err("it is no 64-bit little-endian ELF file"));
        let mut absurd = image();
        absurd[64 + 24..64 + 32].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(require_whole(&absurd), Err("it was cut short"));
    }
}
