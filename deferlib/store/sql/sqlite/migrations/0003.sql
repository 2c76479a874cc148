-- Queues that say where each of their values comes from, and that left their file; what each engine has in flight; notes.
--
-- `min_writer` stays: an older engine leaves all of it as it is.

alter table queues add column said text not null default '';
alter table queues add column disabled integer not null default 0;

-- Counting leased tasks would go through every task that is scheduled for the time of a lease.
create table flights (
    queue text not null,
    node text not null,
    tasks integer not null,
    until integer not null,
    primary key (queue, node)
) strict, without rowid;

create table notes (
    name text primary key,
    value text not null
) strict, without rowid;

update meta set value = '3' where key = 'schema';
