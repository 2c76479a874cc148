-- name: queue_mode
select mode from queues where name = :queue

-- name: queues
select config, source, paused, tat, owner, owned_until, said, disabled from queues order by name

-- name: queue_config
select config from queues where name = :queue

-- name: insert_queue
insert into queues (name, mode, config, source, said, disabled)
values (:name, :mode, :config, :source, :said, :disabled)
on conflict (name) do nothing

-- name: put_queue
insert into queues (name, mode, config, source, said, disabled)
values (:name, :mode, :config, :source, :said, :disabled)
on conflict (name) do update
set mode = excluded.mode, config = excluded.config, source = excluded.source, said = excluded.said,
    disabled = excluded.disabled
where (queues.config, queues.source, queues.said, queues.disabled)
    <> (excluded.config, excluded.source, excluded.said, excluded.disabled)

-- name: pause
update queues set paused = :paused where name = :queue returning name

-- name: own
update queues
set owner = :node, owned_until = :until
where name = :queue and (owner = :node or owned_until <= :now)
returning tat, owned_until

-- name: disown
update queues set owner = '', owned_until = 0 where owner = :node

-- name: disown_all
update queues set owner = '', owned_until = 0 where owner <> ''

-- name: fly
insert into flights (queue, node, tasks, until)
values (:queue, :node, :tasks, :until)
on conflict (queue, node) do update
set tasks = excluded.tasks, until = excluded.until

-- name: land
delete from flights where queue = :queue and node = :node

-- name: land_all
delete from flights

-- name: in_flight
select coalesce(sum(tasks), 0) from flights where queue = :queue and until > :now

-- name: sweep_flights
-- Those of engines that were killed.
delete from flights where until <= :now returning queue

-- name: notes
select name, value from notes

-- name: put_note
insert into notes (name, value) values (:name, :value)
on conflict (name) do update set value = excluded.value

-- name: drop_note
delete from notes where name = :name

-- name: cap
update queues set tat = min(tat, :tat) where name = :queue

-- name: refund
update queues set tat = tat - :spent where name = :queue

-- name: spend
update queues set tat = max(tat, :now) + :spent where name = :queue

-- name: count
insert into counts (queue, tasks, dead)
values (:queue, :tasks, :dead)
on conflict (queue) do update
set tasks = tasks + :tasks, dead = dead + :dead

-- name: tally
insert into minutes (queue, minute, executed, failed)
values (:queue, :minute, :executed, :failed)
on conflict (queue, minute) do update
set executed = executed + :executed, failed = failed + :failed

-- name: counts
select tasks, dead from counts where queue = :queue

-- name: last_minutes
-- The running minute, and of the one before it the share that lies within the last 60 seconds.
select minute, executed, failed from minutes where queue = :queue and minute >= :minute - 1

-- name: sweep_minutes
-- By way of the queues, so that it looks at nothing it doesn't remove; `cross` holds SQLite to that order.
delete from minutes
where (queue, minute) in (
    select queue, minute
    from queues
    cross join minutes on queue = name and minute < :minute
    limit :limit
)
returning queue
