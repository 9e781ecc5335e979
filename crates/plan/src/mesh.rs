//! Ranks on three axes.
//!
//! A mesh lays the ranks out as pipeline x data x tensor, the last axis varying fastest: ranks of a tensor group are
//! neighbours, and so are usually on one host. A group is the set of ranks that differ in one coordinate only.
//!
//! ```text
//! pipeline 2, data 2, tensor 2:        data group of rank 1: ranks 1 and 3
//!   stage 0: [0 1] [2 3]               tensor group of rank 1: ranks 0 and 1
//!   stage 1: [4 5] [6 7]               pipeline group of rank 1: ranks 1 and 5
//! ```

use serde::Serialize;

/// A direction of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Axis {
    /// Ranks that hold consecutive layers.
    Pipeline,
    /// Ranks that see different samples.
    Data,
    /// Ranks that split each layer.
    Tensor,
}

/// Where a rank is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Coordinates {
    /// Pipeline stage.
    pub pipeline: usize,
    /// Index among the replicas.
    pub data: usize,
    /// Index among the tensor-parallel ranks.
    pub tensor: usize,
}

/// The degrees of the three axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Mesh {
    pipeline: usize,
    data: usize,
    tensor: usize,
}

/// Why there is no such mesh.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MeshError {
    /// The fixed degrees do not divide the number of ranks.
    #[error("`{world_size}` ranks cannot be split into pipeline `{pipeline}` x tensor `{tensor}`, expected a multiple of `{}`", pipeline * tensor)]
    NotDivisible {
        /// Ranks in all.
        world_size: usize,
        /// Pipeline degree.
        pipeline: usize,
        /// Tensor degree.
        tensor: usize,
    },
}

impl Mesh {
    /// A mesh of `world_size` ranks; what pipeline and tensor leave is data parallel.
    ///
    /// # Errors
    /// [`MeshError::NotDivisible`] if the degrees do not divide the number of ranks, or one of them is zero.
    pub fn new(world_size: usize, pipeline: usize, tensor: usize) -> Result<Self, MeshError> {
        let fixed = pipeline * tensor;
        if fixed == 0 || world_size == 0 || !world_size.is_multiple_of(fixed) {
            return Err(MeshError::NotDivisible { world_size, pipeline, tensor });
        }
        Ok(Mesh { pipeline, data: world_size / fixed, tensor })
    }

    /// Ranks in all.
    pub fn world_size(&self) -> usize {
        self.pipeline * self.data * self.tensor
    }

    /// Ranks along one axis.
    pub fn degree(&self, axis: Axis) -> usize {
        match axis {
            Axis::Pipeline => self.pipeline,
            Axis::Data => self.data,
            Axis::Tensor => self.tensor,
        }
    }

    /// Where `rank` is.
    pub fn coordinates(&self, rank: usize) -> Coordinates {
        Coordinates {
            pipeline: rank / (self.data * self.tensor),
            data: rank / self.tensor % self.data,
            tensor: rank % self.tensor,
        }
    }

    /// Which rank is there.
    pub fn rank(&self, at: Coordinates) -> usize {
        (at.pipeline * self.data + at.data) * self.tensor + at.tensor
    }

    /// The ranks that differ from `rank` along `axis` only, itself among them, in order.
    pub fn group(&self, rank: usize, axis: Axis) -> Vec<usize> {
        let at = self.coordinates(rank);
        (0..self.degree(axis))
            .map(|i| {
                self.rank(match axis {
                    Axis::Pipeline => Coordinates { pipeline: i, ..at },
                    Axis::Data => Coordinates { data: i, ..at },
                    Axis::Tensor => Coordinates { tensor: i, ..at },
                })
            })
            .collect()
    }

    /// All groups along `axis`, in order of their first ranks.
    pub fn groups(&self, axis: Axis) -> Vec<Vec<usize>> {
        let is_first = |&rank: &usize| {
            let Coordinates { pipeline, data, tensor } = self.coordinates(rank);
            0 == match axis {
                Axis::Pipeline => pipeline,
                Axis::Data => data,
                Axis::Tensor => tensor,
            }
        };
        (0..self.world_size()).filter(is_first).map(|rank| self.group(rank, axis)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tensor_groups_are_neighbours() {
        let mesh = Mesh::new(8, 2, 2).unwrap();
        assert_eq!(mesh.group(1, Axis::Tensor), [0, 1]);
        assert_eq!(mesh.group(1, Axis::Data), [1, 3]);
        assert_eq!(mesh.group(1, Axis::Pipeline), [1, 5]);
        assert_eq!(mesh.groups(Axis::Data), [[0, 2], [1, 3], [4, 6], [5, 7]]);
    }

    #[test]
    fn degrees_that_do_not_divide_are_refused() {
        let error = Mesh::new(6, 2, 2).unwrap_err().to_string();
        assert_eq!(
            error,
            "`6` ranks cannot be split into pipeline `2` x tensor `2`, expected a multiple of `4`"
        );
        assert!(Mesh::new(4, 0, 1).is_err());
    }

    proptest! {
        #[test]
        fn groups_of_an_axis_partition_the_ranks(p in 1usize..5, d in 1usize..5, t in 1usize..5) {
            let mesh = Mesh::new(p * d * t, p, t).unwrap();
            for axis in [Axis::Pipeline, Axis::Data, Axis::Tensor] {
                for rank in 0..mesh.world_size() {
                    prop_assert_eq!(mesh.rank(mesh.coordinates(rank)), rank);
                    let group = mesh.group(rank, axis);
                    prop_assert!(group.contains(&rank));
                    for &other in &group {
                        prop_assert_eq!(&mesh.group(other, axis), &group);
                    }
                }
            }
        }
    }
}
