//! Graphs of a card: work that its driver has recorded.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ptr;

use cudarc::driver::sys;

use super::Graph;
use super::calls::{GraphCalls, done as check};
use crate::error::{Error, Result};

/// The functions, and the graphs by number.
#[derive(Debug)]
pub(super) struct Graphs {
    calls: GraphCalls,
    ready: HashMap<usize, sys::CUgraphExec>,
    next: usize,
}

impl Graphs {
    /// None of a driver that lacks one of the functions.
    pub(super) fn find() -> Option<Graphs> {
        Some(Graphs { calls: GraphCalls::find().ok()?, ready: HashMap::new(), next: 0 })
    }

    /// What `ask` asks for of `stream`, of which nobody else knows. The context has to be current.
    ///
    /// # Errors
    /// [`Error::Device`], and those of `ask`.
    pub(super) fn record(&mut self, stream: sys::CUstream, ask: impl FnOnce() -> Result<()>) -> Result<Graph> {
        // What must not be done while a graph is recorded, this thread does not do; others may.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is the caller's.
        check("cuStreamBeginCapture", unsafe { (self.calls.cuStreamBeginCapture_v2)(stream, mode) })?;
        let asked = ask();
        let (mut graph, mut ready) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: as above; the pointer is to a live variable.
        let ended = check("cuStreamEndCapture", unsafe { (self.calls.cuStreamEndCapture)(stream, &mut graph) });
        if graph.is_null() {
            asked?;
            ended?;
            return Err(Error::Device { what: "cuStreamEndCapture: no graph".into() });
        }
        let made = asked.and(ended).and_then(|()| {
            // SAFETY: the graph is the one just made, the pointer is to a live variable.
            let code = unsafe { (self.calls.cuGraphInstantiateWithFlags)(&mut ready, graph, 0) };
            check("cuGraphInstantiate", code)
        });
        // SAFETY: nobody else knows of the graph, from which `ready` was copied. An error would hide the result.
        let _ = unsafe { (self.calls.cuGraphDestroy)(graph) };
        made?;
        self.next += 1;
        self.ready.insert(self.next, ready);
        Ok(Graph(self.next))
    }

    fn unknown(graph: Graph) -> Error {
        Error::Device { what: format!("{graph:?} is of no work") }
    }

    /// Asks `stream` for all of it. The context has to be current.
    pub(super) fn replay(&self, graph: Graph, stream: sys::CUstream) -> Result<()> {
        let ready = self.ready.get(&graph.0).ok_or_else(|| Self::unknown(graph))?;
        // SAFETY: the graph was made in the context that is current and was not given up.
        check("cuGraphLaunch", unsafe { (self.calls.cuGraphLaunch)(*ready, stream) })
    }

    /// Gives a graph up that does not run.
    pub(super) fn forget(&mut self, graph: Graph) -> Result<()> {
        let ready = self.ready.remove(&graph.0).ok_or_else(|| Self::unknown(graph))?;
        // SAFETY: it was in the table, and now nobody knows of it.
        check("cuGraphExecDestroy", unsafe { (self.calls.cuGraphExecDestroy)(ready) })
    }

    /// Gives all of them up; none runs.
    pub(super) fn release(&mut self) {
        for (_, ready) in self.ready.drain() {
            // SAFETY: as above. Errors cannot be handed to anyone.
            let _ = unsafe { (self.calls.cuGraphExecDestroy)(ready) };
        }
    }
}
