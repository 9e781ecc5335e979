//! Which GPU a rank uses.

use super::CudaError;

/// Whether several ranks may use one GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// Each rank has a GPU to itself.
    #[default]
    Exclusive,
    /// Ranks take GPUs in turn: for tests of many ranks on few cards, where they share its memory and its time.
    Shared,
}

/// The GPU of the rank that is number `local_rank` on its host, where the driver sees `num_gpus`.
///
/// # Errors
/// [`CudaError::TooFewGpus`] if it would have to share and nobody asked for that.
pub fn gpu_for_rank(local_rank: usize, num_gpus: usize, sharing: Sharing) -> Result<u32, CudaError> {
    let too_few = CudaError::TooFewGpus { local_rank, num_gpus };
    let ordinal = match sharing {
        _ if num_gpus == 0 => return Err(too_few),
        Sharing::Exclusive if local_rank >= num_gpus => return Err(too_few),
        Sharing::Exclusive => local_rank,
        Sharing::Shared => local_rank % num_gpus,
    };
    u32::try_from(ordinal).map_err(|_| too_few)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_share_only_if_asked() {
        let exclusive: Vec<_> = (0..3).map(|rank| gpu_for_rank(rank, 2, Sharing::Exclusive)).collect();
        assert_eq!(exclusive[..2], [Ok(0), Ok(1)]);
        let error = exclusive[2].clone().unwrap_err().to_string();
        assert_eq!(
            error,
            "local rank `2` has no GPU of its own: the driver sees `2`; start fewer ranks, or ask for ranks to share GPUs"
        );
        let shared: Vec<_> = (0..5).map(|rank| gpu_for_rank(rank, 2, Sharing::Shared).unwrap()).collect();
        assert_eq!(shared, [0, 1, 0, 1, 0]);
        assert!(gpu_for_rank(0, 0, Sharing::Shared).is_err());
    }
}
