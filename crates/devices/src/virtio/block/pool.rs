//! Threads for what blocks.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;

use parking_lot::{Condvar, Mutex};

/// Most threads of one disk.
const MAX_THREADS: usize = 4;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    closed: bool,
}

/// A few threads, started when there is work for them. They end when the last [`Pool`] is dropped.
pub struct Pool {
    shared: Arc<Shared>,
    name: String,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

impl Pool {
    /// A pool without threads yet; they will be called `name`.
    pub fn new(name: String) -> Arc<Self> {
        Arc::new(Self { shared: Arc::default(), name })
    }

    /// Runs `job` on a thread of the pool; here, if the host refuses to make one.
    pub fn run(&self, job: Job) {
        let mut state = self.shared.state.lock();
        if state.idle <= state.jobs.len() && state.threads < MAX_THREADS {
            let shared = self.shared.clone();
            let started = thread::Builder::new().name(self.name.clone()).spawn(move || shared.serve());
            match started {
                Ok(_) => state.threads += 1,
                Err(_) if state.threads == 0 => {
                    drop(state);
                    return job();
                }
                Err(_) => {}
            }
        }
        state.jobs.push_back(job);
        drop(state);
        self.shared.work.notify_one();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.work.notify_all();
    }
}

impl Shared {
    fn serve(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.state.lock();
            } else if state.closed {
                return;
            } else {
                state.idle += 1;
                self.work.wait(&mut state);
                state.idle -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn jobs_run_side_by_side() {
        let pool = Pool::new("pool".into());
        let barrier = Arc::new(std::sync::Barrier::new(MAX_THREADS));
        let (sender, receiver) = channel();
        for n in 0..MAX_THREADS {
            let (barrier, sender) = (barrier.clone(), sender.clone());
            pool.run(Box::new(move || {
                barrier.wait();
                let _ = sender.send(n);
            }));
        }
        drop(sender);
        let mut done: Vec<usize> = receiver.iter().collect();
        done.sort_unstable();
        assert_eq!(done, (0..MAX_THREADS).collect::<Vec<_>>());
    }
}
