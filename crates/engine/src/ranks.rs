//! The ranks of a run on their mesh, and the groups that a rank is in.

use shardwise_comm::{CommError, Group, Ledger, solo};
use shardwise_plan::{Axis, Coordinates, Mesh};

/// A rank's place in a mesh and its groups, one for each axis and one of all ranks.
#[derive(Clone)]
pub struct Ranks {
    mesh: Mesh,
    at: Coordinates,
    /// All ranks.
    pub(crate) world: Group,
    /// The stages that hold the other layers of this rank's model, in order.
    pub(crate) pipeline: Group,
    /// The ranks that see other samples: state is sharded over them.
    pub(crate) data: Group,
    /// The ranks that hold the other parts of this rank's layers.
    pub(crate) tensor: Group,
}

impl Ranks {
    /// Lays the ranks of `world` out as `mesh`.
    ///
    /// # Collective
    /// Every rank of `world` calls with the same mesh.
    /// # Errors
    /// A failed collective.
    /// # Panics
    /// If the mesh has another number of ranks than the group.
    pub fn new(world: Group, mesh: Mesh) -> Result<Self, CommError> {
        let messages = world.clone();
        Ranks::with_messages(world, &messages, mesh)
    }

    /// [`Ranks::new`], with another group of the same ranks for what pipeline stages send each other. They do so from threads beside
    /// the rank's own, which not every back end takes together with collectives.
    ///
    /// # Collective
    /// As [`Ranks::new`].
    /// # Errors
    /// A failed collective.
    /// # Panics
    /// If the mesh has another number of ranks than a group.
    pub fn with_messages(world: Group, messages: &Group, mesh: Mesh) -> Result<Self, CommError> {
        for group in [&world, messages] {
            assert_eq!(group.group_size(), mesh.world_size(), "a mesh of as many ranks as the group has");
        }
        let pipeline = group_along(messages, mesh, Axis::Pipeline, "pipeline");
        let data = group_along(&world, mesh, Axis::Data, "data");
        let tensor = group_along(&world, mesh, Axis::Tensor, "tensor");
        let at = mesh.coordinates(world.group_rank());
        Ok(Ranks { mesh, at, pipeline: pipeline?, data: data?, tensor: tensor?, world })
    }

    /// The mesh.
    pub fn mesh(&self) -> Mesh {
        self.mesh
    }

    /// Where this rank is.
    pub fn at(&self) -> Coordinates {
        self.at
    }

    /// All ranks.
    pub fn world(&self) -> &Group {
        &self.world
    }

    /// Bytes that this rank has sent so far in the groups of the mesh.
    pub(crate) fn sent_bytes(&self) -> u64 {
        let sent = |group: &Group| Ledger::total(&group.ledger()).sent_bytes;
        let axes = [&self.pipeline, &self.data, &self.tensor];
        // An axis of all ranks is the world itself.
        let apart = axes.iter().filter(|group| !std::sync::Arc::ptr_eq(group, &self.world));
        sent(&self.world) + apart.map(|group| sent(group)).sum::<u64>()
    }
}

/// All ranks are data parallel.
impl From<Group> for Ranks {
    fn from(world: Group) -> Self {
        let mesh =
            Mesh::new(world.group_size(), 1, 1).expect("a group has a rank, and one divides every number");
        let at = mesh.coordinates(world.group_rank());
        Ranks { mesh, at, data: world.clone(), pipeline: solo(), tensor: solo(), world }
    }
}

/// This rank's group along an axis. All ranks make all of them.
fn group_along(world: &Group, mesh: Mesh, axis: Axis, name: &str) -> Result<Group, CommError> {
    match mesh.degree(axis) {
        1 => return Ok(solo()),
        degree if degree == mesh.world_size() => return Ok(world.clone()),
        _ => {}
    }
    let mut own = None;
    for ranks in mesh.groups(axis) {
        own = world.subgroup(name, &ranks)?.or(own);
    }
    Ok(own.expect("a rank is in one group of each axis"))
}
