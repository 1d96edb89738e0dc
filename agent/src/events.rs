// SPDX-License-Identifier: Apache-2.0

//! What happened without being asked for: exits and OOM kills, in a bounded queue that one host reads.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use caisson_protocol::agent::agent::{Event, GetEventsResponse};
use tokio::sync::Notify;

/// Most events that wait; the oldest go first when there are more.
const MAX_QUEUED: usize = 1024;
/// Most events in one answer.
const MAX_ANSWER: usize = 256;

#[derive(Debug, Default)]
struct Queue {
    events: VecDeque<Event>,
    dropped: u64,
}

/// The queue.
#[derive(Debug, Default)]
pub(crate) struct Events {
    queue: Mutex<Queue>,
    changed: Notify,
    reader: tokio::sync::Mutex<()>,
}

impl Events {
    /// Queues `event`.
    pub(crate) fn push(&self, event: Event) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.events.len() == MAX_QUEUED {
            queue.events.pop_front();
            queue.dropped += 1;
        }
        queue.events.push_back(event);
        drop(queue);
        self.changed.notify_one();
    }

    /// Waits for at least one event and takes the oldest, at most 256; `None` when somebody else is
    /// waiting already.
    pub(crate) async fn next(&self) -> Option<GetEventsResponse> {
        let _reader = self.reader.try_lock().ok()?;
        loop {
            if let Some(answer) = self.take() {
                return Some(answer);
            }
            self.changed.notified().await;
        }
    }

    fn take(&self) -> Option<GetEventsResponse> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.events.is_empty() {
            return None;
        }
        let count = queue.events.len().min(MAX_ANSWER);
        Some(GetEventsResponse {
            events: queue.events.drain(..count).collect(),
            dropped: std::mem::take(&mut queue.dropped),
            ..Default::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(at_ns: u64) -> Event {
        Event {
            at_ns,
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn events_come_in_order_in_answers_of_bounded_size() {
        let events = Events::default();
        (0..300).for_each(|number| events.push(numbered(number)));
        let first = events.next().await.unwrap();
        let second = events.next().await.unwrap();
        let numbers: Vec<u64> = first.events.iter().map(|event| event.at_ns).collect();
        assert_eq!(numbers, (0..256).collect::<Vec<_>>());
        assert_eq!((second.events.len(), second.dropped), (44, 0));
    }

    #[tokio::test]
    async fn what_overflows_is_the_oldest_and_is_counted() {
        let events = Events::default();
        (0..1030).for_each(|number| events.push(numbered(number)));
        let first = events.next().await.unwrap();
        assert_eq!((first.events[0].at_ns, first.dropped), (6, 6));
        assert_eq!(events.next().await.unwrap().dropped, 0);
    }

    #[tokio::test]
    async fn a_second_reader_is_turned_away_and_a_waiting_one_is_woken() {
        let events = std::sync::Arc::new(Events::default());
        let reader = tokio::spawn({
            let events = events.clone();
            async move { events.next().await }
        });
        tokio::task::yield_now().await;
        assert!(events.next().await.is_none());
        events.push(numbered(9));
        assert_eq!(reader.await.unwrap().unwrap().events[0].at_ns, 9);
    }
}
